"""AutoencoderKLFlux2 against diffusers' class and what its pipelines make of its latents."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from conformance import Published, Rules, Size, torch_class
from conformance_autoencoder import AutoencoderCase, AutoencoderSuite, nchw, nhwc, normal
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline

from gadjax.errors import InputError
from gadjax.formats.state_dict import params_from_tensors
from gadjax.models.vae import autoencoder_flux2 as flux2

PUBLISHED = json.loads(Path(__file__).parents[1].joinpath("published.json").read_text())
REAL = PUBLISHED["FLUX.2-klein-base-4B"]["vae/config.json"]


def config_of(widths, layers, groups, latent, **more):
    return {
        "_class_name": "AutoencoderKLFlux2",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "latent_channels": latent,
        **more,
    }


def without_count(cfg):
    """Network whose batch norm counts no batches: that integer is tested below."""
    model = torch_class(AutoencoderKLFlux2, ("force_upcast",))(cfg)
    model.bn.num_batches_tracked = None
    return model


def normalised(model, patches):
    """As in Flux2KleinPipeline."""
    mean = model.bn.running_mean.view(1, -1, 1, 1)
    return patches - mean, torch.sqrt(
        model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps
    )


def moments(model, image):
    posterior = model.encode(image).latent_dist
    centred, deviation = normalised(model, Flux2KleinPipeline._patchify_latents(posterior.mean))
    logvar = Flux2KleinPipeline._patchify_latents(posterior.logvar)
    return centred / deviation, logvar - 2 * torch.log(deviation)


class Flux2Case(AutoencoderCase):
    @torch.no_grad()
    def torch_outputs(self, model, image, latent):
        mean, logvar = self.torch_encode(model, nchw(image))
        _, deviation = normalised(model, nchw(latent))
        latent = nchw(latent) * deviation + model.bn.running_mean.view(1, -1, 1, 1)
        decoded = model.decode(Flux2KleinPipeline._unpatchify_latents(latent)).sample
        return [nhwc(x) for x in (mean, logvar, decoded)]


SMALL = config_of([8, 12], 1, 4, 4, batch_norm_eps=0.3)
TINY = config_of([4, 6], 1, 2, 2)
CASE = Flux2Case(
    family=flux2.FAMILY,
    torch_network=without_count,
    torch_encode=moments,
    sizes={
        "4": Size(SMALL, 3, 2),
        "3": Size(config_of([12, 18, 6], 2, 6, 3, use_quant_conv=False), 2, 5),
    },
    tiny=Size(TINY, 2, 1),
    remat_blocks=4 + 1 + 2,
    step=1e-5,
    tolerance=1e-7,
    published={"klein": Published(REAL, 84_046_115, 250)},
    untrained=("bn/running_mean", "bn/running_var"),
    rules=Rules(mesh={"fsdp": 128}),
    refused_in=REAL,
    refused=[
        ("act_fn", "relu"),
        ("patch_size", [1, 1]),
        ("decoder_block_out_channels", [96, 192, 384, 384]),
        ("scaling_factor", 0.3611),
        ("shift_factor", 0.1159),
        ("batch_norm_eps", -1e-4),
        ("down_block_types", ["DownEncoderBlock2D"]),
        ("norm_num_groups", 3),
        ("dropout", 0.1),
    ],
)


class TestAutoencoderFlux2(AutoencoderSuite):
    case = CASE

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["encode", "decode"])
    def test_derivatives_are_those_of_central_differences(self, method):
        super().test_derivatives_are_those_of_central_differences(method)

    @pytest.mark.slow
    @pytest.mark.parametrize("remat", [True, False])
    def test_remat_recomputes_every_block(self, remat):
        super().test_remat_recomputes_every_block(remat)

    @pytest.mark.slow
    def test_bfloat16_is_close(self):
        super().test_bfloat16_is_close()


def test_the_published_latents():
    config = CASE.config(REAL)
    assert (config.latent_channels, config.upscale, config.raw.latent_channels) == (128, 16, 32)
    # The class's own defaults are the published options.
    assert CASE.config({"_class_name": "AutoencoderKLFlux2"}) == config


def test_latents_of_one_statistic_differ_from_anothers():
    """The statistics are read from the files, and the count of their batches is read past."""
    model = CASE.random_torch_network(TINY)
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    tensors["bn.num_batches_tracked"] = np.array(7)
    abstract = CASE.network(TINY).abstract
    params = params_from_tensors(tensors, abstract, flux2.FAMILY.keymap)
    np.testing.assert_array_equal(params["bn"]["running_var"], model.bn.running_var.numpy())
    other = params | {"bn": {name: 2 * value for name, value in params["bn"].items()}}
    apply, latent = CASE.network(TINY).apply, normal(2, 1, 2, 1, 8)
    decode = jax.jit(lambda params: apply(params, latent, method="decode"))
    assert np.abs(decode(params) - decode(other)).max() > 1e-3
    del tensors["bn.running_mean"]
    with pytest.raises(InputError, match="1 missing: bn.running_mean"):
        params_from_tensors(tensors, abstract, flux2.FAMILY.keymap)
