"""AutoencoderDC against diffusers' class: values, derivatives, key names, shardings."""

from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch.nn.functional as F
from conformance import Published, Rules, Size, torch_class
from conformance_autoencoder import AutoencoderCase, AutoencoderSuite, nchw, nhwc, normal

from gadjax.errors import InputError
from gadjax.models.vae import autoencoder_dc as dc
from gadjax.models.vae import dc_blocks

BLOCKS = ["ResBlock", "EfficientViTBlock"]
# Configuration of all published Sana repositories.
PUBLISHED = {
    "_class_name": "AutoencoderDC",
    "_diffusers_version": "0.33.0.dev0",
    "_name_or_path": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
    "attention_head_dim": 32,
    "decoder_act_fns": "silu",
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_types": [BLOCKS[0]] * 3 + [BLOCKS[1]] * 3,
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "decoder_norm_types": "rms_norm",
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "Conv",
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_block_types": [BLOCKS[0]] * 3 + [BLOCKS[1]] * 3,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "in_channels": 3,
    "latent_channels": 32,
    "scaling_factor": 0.41407,
    "upsample_block_type": "interpolate",
}


def config_of(widths, layers, kernels, latent, head_dim, **more):
    types = [BLOCKS[1] if kernel is not None else BLOCKS[0] for kernel in kernels]
    side = {
        "block_out_channels": widths,
        "block_types": types,
        "qkv_multiscales": [kernel or [] for kernel in kernels],
    }
    sides = {f"{half}_{k}": v for half in ("encoder", "decoder") for k, v in side.items()}
    sides |= {"encoder_layers_per_block": layers[0], "decoder_layers_per_block": layers[1]}
    return PUBLISHED | sides | {"latent_channels": latent, "attention_head_dim": head_dim, **more}


# The second has heads that do not fill the width, two scales or none, and another decoder.
SMALL = config_of([6, 8, 16], ([1, 1, 1], [1, 1, 2]), [None, None, [5]], 8, 4)
OTHER = config_of([12, 24], ([1, 1], [1, 1]), [[], [3, 5]], 6, 5) | {
    "decoder_block_out_channels": [9, 18],
    "decoder_block_types": BLOCKS[1],
    "decoder_act_fns": ["silu", "silu"],
}
TINY = config_of([4, 8], ([1, 1], [1, 1]), [None, [3]], 4, 3)
CASE = AutoencoderCase(
    family=dc.FAMILY,
    torch_network=torch_class(diffusers.AutoencoderDC),
    torch_encode=lambda model, image: (model.encode(image).latent, None),
    # 2 x 1 latents: diffusers leaves linear attention where there are few positions.
    sizes={
        f"{name} {h} x {w}": Size(cfg, h, w)
        for name, cfg in (("three stages", SMALL), ("two scales", OTHER))
        for h, w in ((6, 4), (2, 1))
    },
    tiny=Size(TINY, 3, 2),
    remat_blocks=3,
    step=1e-6,  # every relu is a kink
    tolerance=1e-6,
    published={"f32c32": Published(PUBLISHED, 312_250_275, 375)},
    rules=Rules(mesh={"fsdp": 32}, small_divide=False),
    refused_in=PUBLISHED,
    refused=[
        ("downsample_block_type", "pixel_unshuffle"),
        ("upsample_block_type", "pixel_shuffle"),
        ("encoder_out_shortcut", False),
        ("decoder_in_shortcut", False),
        ("decoder_conv_act_fn", "silu"),
        ("decoder_norm_types", ["rms_norm", "layer_norm"]),
        ("decoder_act_fns", "relu6"),
        ("encoder_block_types", ["ResBlock"] * 5 + ["Attention"]),
        ("decoder_block_types", ["ResBlock"]),
        ("encoder_layers_per_block", [0, 1, 1, 1, 1, 1]),
        ("decoder_qkv_multiscales", [[5]]),
        ("encoder_block_out_channels", [128, 256, 512, 512, 1024, 1000]),
        ("decoder_block_out_channels", [128, 256, 512, 512, 1024, 3072]),
        ("shift_factor", 0.1),
    ],
)


class TestAutoencoderDC(AutoencoderSuite):
    case = CASE


def test_pixel_shuffles_are_those_of_torch():
    x = normal(0, 2, 4, 6, 3)
    small = dc_blocks.pixel_unshuffle(x)
    assert np.array_equal(small, nhwc(F.pixel_unshuffle(nchw(x), 2)))
    assert np.array_equal(dc_blocks.pixel_shuffle(small), x)
    # Neighbouring channels share a mean, and are copies of one.
    assert np.array_equal(dc_blocks.average_channels(np.arange(6.0), 3), [0.5, 2.5, 4.5])
    assert np.array_equal(dc_blocks.repeat_channels(np.arange(2.0), 4), [0, 0, 1, 1])


def test_published_config_is_read_and_scales_as_the_pipelines_do():
    config = dc.Config.from_dict(PUBLISHED)
    assert (config.upscale, config.latent_channels) == (32, 32)
    latent = normal(0, 1, 2, 3, 32)
    np.testing.assert_allclose(dc.scale(latent, config), latent * 0.41407, rtol=1e-6)
    np.testing.assert_allclose(dc.unscale(latent, config), latent / 0.41407, rtol=1e-6)


def test_absent_samplers_are_those_of_diffusers_and_refused():
    for key in ("downsample_block_type", "upsample_block_type"):
        with pytest.raises(InputError, match=f"^{key}: found 'pixel_"):
            dc.Config.from_dict({k: v for k, v in PUBLISHED.items() if k != key})


def test_images_of_other_sizes_are_refused():
    made = CASE.network(SMALL)
    with pytest.raises(InputError, match="image: found 8 x 6; expected multiples of 4"):
        jax.eval_shape(partial(made.apply, method="encode"), made.abstract, jnp.zeros((1, 8, 6, 3)))
