"""AutoencoderKL against diffusers' class: values, derivatives, key names, shardings."""

import diffusers
import jax
import numpy as np
import torch
from conformance import Published, Rules, Size, torch_class, torch_reference
from conformance_autoencoder import AutoencoderCase, AutoencoderSuite, normal

from gadjax.formats.state_dict import params_from_tensors
from gadjax.models.vae import autoencoder_kl as kl


def config_of(widths, layers, groups, **more):
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "latent_channels": 4,
        **more,
    }


# Two sizes that differ in everything; the second as SD3 and FLUX have it.
SD3 = dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
SMALL = config_of([8, 12, 16], 1, 4)
SMALL_16 = config_of([12, 18], 2, 6, scaling_factor=1.5305, shift_factor=0.0609, **SD3)
TINY = config_of([4, 6], 1, 2)
FULL = [128, 256, 512, 512], 2, 32


def moments(model, image):
    posterior = model.encode(image).latent_dist
    return posterior.mean, posterior.logvar


CASE = AutoencoderCase(
    family=kl.FAMILY,
    torch_network=torch_class(diffusers.AutoencoderKL),
    torch_encode=moments,
    sizes={"4": Size(SMALL, 6, 4), "16": Size(SMALL_16, 12, 8)},
    tiny=Size(TINY, 3, 2),
    remat_blocks=4 + 1 + 2,  # residual blocks of both stages, the attention, its two neighbours
    step=1e-5,
    tolerance=1e-7,
    published={
        "SD": Published(config_of(*FULL), 83_653_863, 248),
        "SD3": Published(config_of(*FULL, **SD3), 83_819_683, 244),
    },
    rules=Rules(mesh={"fsdp": 128}),
    refused_in=SMALL | {"sample_size": 32},
    refused=[
        ("act_fn", "relu"),
        ("up_block_types", ["AttnUpDecoderBlock2D"] * 3),
        ("down_block_types", ["DownEncoderBlock2D"]),
        ("latents_mean", [0.0] * 4),
        ("norm_num_groups", 3),
        ("dropout", 0.1),
    ],
)


class TestAutoencoderKL(AutoencoderSuite):
    case = CASE


def test_the_log_variance_is_clamped():
    model = CASE.random_torch_network(TINY)
    with torch.no_grad():
        model.quant_conv.bias[4:6], model.quant_conv.bias[6:] = -1000, 1000
    apply, image = CASE.network(TINY).apply, normal(1, 1, 6, 4, 3)
    logvar = jax.jit(lambda p: apply(p, image, method="encode")[1])(CASE.params(model, TINY))
    assert (logvar[..., :2] == -30).all() and (logvar[..., 2:] == 20).all()


def test_scale_is_that_of_diffusers_pipelines():
    config, latent = CASE.config(SMALL_16), normal(0, 1, 2, 3, 16)
    np.testing.assert_allclose(kl.scale(latent, config), (latent - 0.0609) * 1.5305, rtol=1e-6)
    np.testing.assert_allclose(kl.unscale(kl.scale(latent, config), config), latent, atol=1e-6)


def test_old_names_of_the_attention_load_to_the_same():
    model = torch_reference(CASE, "4")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, value in model.state_dict().items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        tensors[key] = value.numpy()
    assert sum("proj_attn" in key for key in tensors) == 4
    loaded = params_from_tensors(tensors, CASE.network(SMALL).abstract, kl.FAMILY.keymap)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, CASE.params(model, SMALL)))
