"""Lumina 2's transformer: the conformance suite, and what only this family has."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from conformance import (
    BackboneSuite,
    Case,
    Published,
    Rules,
    Size,
    Tangents,
    loaded,
    relative,
    torch_class,
)
from diffusers import Lumina2Transformer2DModel

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.schedules import Flow
from gadjax.errors import InputError
from gadjax.models import lumina2

PUBLISHED = json.loads(Path(__file__).parents[1].joinpath("published.json").read_text())
REAL = PUBLISHED["Lumina-Image-2.0"]["transformer/config.json"]


def tiny(heads, kv_heads, axes, layers, refiners, *, lens=(50, 16, 16), text=20, **more):
    return REAL | {
        "hidden_size": heads * sum(axes),
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "num_layers": layers,
        "num_refiner_layers": refiners,
        "axes_dim_rope": list(axes),
        "axes_lens": list(lens),
        "cap_feat_dim": text,
        "in_channels": 5,
        "multiple_of": 16,
        **more,
    }


# Name -> config, latent height and width. The prompts have 40, 3 and 1 of 40 tokens.
SIZES = {
    "shared heads": Size(tiny(4, 2, (4, 4, 6), 2, 1), 8, 10),
    "one head of keys, tall": Size(
        tiny(6, 1, (2, 4, 4), 3, 2, text=28, in_channels=3, norm_eps=1e-3, ffn_dim_multiplier=0.7),
        12,
        6,
    ),
}

LENGTHS = 40, 3, 1


def image_tokens(out):
    """diffusers packs each sample's image behind the tokens of its caption."""
    images = out.shape[1] - max(LENGTHS)
    return torch.stack([row[n : n + images] for row, n in zip(out, LENGTHS, strict=True)])


CASE = Case(
    family=lumina2.FAMILY,
    torch_network=torch_class(Lumina2Transformer2DModel),
    sizes=SIZES,
    times=lambda config: (1.0, 499.25, 1000.0),
    extras=lambda config, r, batch: None,
    blocks=lambda model: model.layers,
    tokens=image_tokens,
    length=40,
    tangents=Tangents(
        size=Size(tiny(2, 1, (2, 2, 4), 1, 1), 4, 6),
        paths=("context_refiner/attn/to_k/kernel",),
        times=(1.0, 499.25),
        length=3,
    ),
    bfloat16=SIZES["shared heads"],
    fresh=SIZES["shared heads"],
    layers="layers/ff/w1/kernel",
    published={"2.0": Published(REAL, 2_609_769_152, 459)},
    rules=Rules(mesh={"fsdp": 64, "tensor": 2}, replicated=("/norm_q/scale", "/norm_k/scale")),
    refused_in=REAL,
    refused=[
        ("patch_size", 4),
        ("out_channels", 32),
        ("num_kv_heads", 7),
        ("num_kv_heads", None),
        ("num_attention_heads", 0),
        ("axes_dim_rope", [32, 32]),
        ("axes_dim_rope", [33, 31, 32]),
        ("axes_dim_rope", [32, 32, 34]),
        ("axes_lens", [300, 512, 0]),
        ("ffn_dim_multiplier", 0),
        ("norm_eps", None),
        ("num_layers", "26"),
        ("sample_size", 127),
        ("quantization_config", {"load_in_4bit": True}),
    ],
)


class TestLumina2(BackboneSuite):
    case = CASE
    test_kv_cache_stands_for_the_prompt = None  # the caption's tokens change from layer to layer


def test_a_sample_does_not_depend_on_the_others_nor_on_padding():
    both = loaded(CASE, "shared heads")
    x, t, cond = both.inputs
    out, _ = both.raw(both.params, x, t, cond)
    for i, length in ((1, 3), (2, 33)):
        row = slice(i, i + 1)
        alone = cond._replace(text=cond.text[row, :length], mask=cond.mask[row, :length])
        found, _ = both.raw(both.params, x[row], t[row], alone)
        assert relative(found, out[row]) <= 1e-5


def test_too_long_prompts_are_refused():
    network, config = CASE.network(REAL), CASE.config(REAL)
    call = lumina2.FAMILY.predictor(network.apply, config)
    x, t = np.zeros((1, 128, 128, 16), np.float32), np.zeros(1, np.float32)
    _, _, cond = CASE.inputs(Size(REAL, 2, 2), 1, 300)
    with pytest.raises(InputError, match="^length: found 300 tokens .*; expected at most 299"):
        jax.eval_shape(call, network.abstract, x, t, cond)


def test_guidance_keeps_the_norms_of_the_conditional_output():
    """Of each channel's rows over the width, as Lumina2Pipeline's axis of NCHW has it."""
    r = np.random.default_rng(0)
    cond, null = r.standard_normal((2, 2, 4, 6, 3), np.float32)

    def apply(params, x, t, text):
        return text

    call = Denoiser(apply, Flow(), "flow", guided_norm=-2).guided_raw
    found = call({}, np.zeros_like(cond), 500.0, cond, null, 4.0)
    guided = null + 4 * (cond - null)
    ratio = np.linalg.norm(cond, axis=2, keepdims=True) / np.linalg.norm(
        guided, axis=2, keepdims=True
    )
    np.testing.assert_allclose(found, guided * ratio, rtol=1e-5)
    np.testing.assert_allclose(call({}, cond, 500.0, cond, null, 1), cond, rtol=1e-6)
