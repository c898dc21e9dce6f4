"""FLUX.1's transformer: the conformance suite, and what only this family has."""

import jax
import numpy as np
import pytest
import torch
from conformance import BackboneSuite, Case, Published, Rules, Size, Tangents, loaded, torch_class
from diffusers import FluxPipeline, FluxTransformer2DModel

from gadjax.errors import InputError
from gadjax.models import flux, layers
from gadjax.models.flux.prompts import FluxPromptEncoder

# Configurations of the two published repositories.
SCHNELL = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.30.0.dev0",
    "attention_head_dim": 128,
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
DEV = SCHNELL | {"guidance_embeds": True}


def tiny(heads, axes, double, single, *, joint=20, pooled=14, channels=12, **more):
    return SCHNELL | {
        "num_attention_heads": heads,
        "attention_head_dim": sum(axes),
        "axes_dims_rope": list(axes),
        "num_layers": double,
        "num_single_layers": single,
        "joint_attention_dim": joint,
        "pooled_projection_dim": pooled,
        "in_channels": channels,
        **more,
    }


# Name -> config, latent height and width.
SIZES = {
    "schnell": Size(tiny(3, (4, 6, 6), 2, 2), 8, 8),
    "dev, wide": Size(tiny(2, (2, 8, 6), 1, 3, joint=28, channels=16, guidance_embeds=True), 6, 14),
    "tall": Size(tiny(4, (4, 2, 4), 3, 1, pooled=10, channels=8, out_channels=8), 12, 4),
}


def extras(config, r, batch):
    given = {"pooled": r.standard_normal((batch, config.pooled_dim), np.float32)}
    if config.guidance_embeds:
        # Of a larger scale, embedded as 1000 times itself, an ulp of a frequency shows: torch's exp
        # is an ulp off in 3 of 128 frequencies.
        given["guidance"] = np.array([3.5, 0, 1.25], np.float32)[:batch]
    return given


CASE = Case(
    family=flux.FAMILY,
    torch_network=torch_class(FluxTransformer2DModel, ("sample_size",)),
    sizes=SIZES,
    times=lambda config: (1.0, 499.25, 1000.0),
    extras=extras,
    blocks=lambda model: [*model.transformer_blocks, *model.single_transformer_blocks],
    tokens=lambda both: both[1],
    tangents=Tangents(
        size=Size(tiny(2, (2, 4, 2), 1, 1, guidance_embeds=True, channels=8), 4, 6),
        paths=("double_blocks/attn_context/to_k/kernel", "single_blocks/ff/proj_out/kernel"),
        times=(1.0, 499.25),
        length=3,
    ),
    bfloat16=SIZES["dev, wide"],
    fresh=SIZES["schnell"],
    layers="single_blocks/ff/proj_mlp/kernel",
    published={
        "schnell": Published(SCHNELL, 11_891_178_560, 1156),
        "dev": Published(DEV, 11_901_408_320, 1160),
    },
    rules=Rules(mesh={"fsdp": 64, "tensor": 8}, complete=True, replicated=("/bias", "/scale")),
    refused_in=DEV,
    refused=[
        ("patch_size", 2),
        ("in_channels", 62),
        ("out_channels", 32),
        ("axes_dims_rope", [16, 56, 57]),
        ("axes_dims_rope", [16, 56]),
        ("axes_dims_rope", [15, 57, 56]),
        ("axes_dims_rope", "16"),
        ("guidance_embeds", 1),
        ("num_single_layers", 0),
        ("num_layers", "19"),
        ("sample_size", 63),
        ("qk_norm", "rms_norm"),
        ("quantization_config", {"load_in_4bit": True}),
    ],
)


class TestFlux(BackboneSuite):
    case = CASE
    test_kv_cache_stands_for_the_prompt = None  # the text's stream changes from layer to layer


def test_latents_are_packed_as_the_pipeline_packs_them():
    x = np.random.default_rng(0).standard_normal((2, 6, 4, 3), np.float32)
    theirs = FluxPipeline._pack_latents(torch.tensor(x).permute(0, 3, 1, 2), 2, 3, 6, 4)
    packed = layers.patchify(x, 2, channels_first=True)
    np.testing.assert_array_equal(packed, theirs.numpy())
    np.testing.assert_array_equal(layers.unpatchify(packed, 6, 4, 2, channels_first=True), x)


def test_published_configs_are_read():
    for cfg in (SCHNELL, DEV):
        config = CASE.config(cfg)
        assert (config.dim, config.latent_channels, config.sample_size) == (3072, 16, 128)
        assert config.axes_dims_rope == (16, 56, 56)
        assert config.guidance_embeds == cfg["guidance_embeds"]


def test_bad_inputs_are_refused():
    both = loaded(CASE, "dev, wide")
    x, t, cond = both.inputs
    config = CASE.config(SIZES["dev, wide"].config)
    call = flux.FAMILY.predictor(both.network.apply, config)
    with pytest.raises(InputError, match="multiples of the patch size 2"):
        jax.eval_shape(call, both.params, x[:, :-1], t, cond)
    untold = cond._replace(extras={"pooled": cond.extras["pooled"]})
    with pytest.raises(InputError, match="guidance: found none; expected the scale"):
        jax.eval_shape(call, both.params, x, t, untold)


def test_the_text_is_t5_s_and_its_padding_takes_part():
    seen = {}

    def clip(params, ids):
        seen["clip"] = ids
        return type("Clip", (), {"pooled": np.ones((2, 3))})

    def t5(params, ids, mask):
        seen["t5"], seen["mask"] = ids, mask
        return np.zeros((2, 5, 4))

    encoder = FluxPromptEncoder((None, None), clip, t5, clip_length=7)
    ids = np.arange(24).reshape(2, 12)
    embeds = encoder.encode({"text_encoder": {}, "text_encoder_2": {}}, ids, np.zeros_like(ids))
    np.testing.assert_array_equal(seen["clip"], ids[:, :7])
    np.testing.assert_array_equal(seen["t5"], ids[:, 7:])
    assert seen["mask"].all() and embeds.mask.all() and embeds.mask.shape == (2, 5)
    assert embeds.pooled.shape == (2, 3) and encoder.embed_length(5) == 5
