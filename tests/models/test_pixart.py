"""PixArt-alpha: the conformance suite, and what only this family has."""

import jax
import numpy as np
import pytest
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
from diffusers import PixArtTransformer2DModel

from gadjax.errors import InputError
from gadjax.models import pixart
from gadjax.models.params import flatten

# Configurations of the published repositories.
PUBLISHED = {
    "_class_name": "Transformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 64,
    "upcast_attention": False,
    "use_linear_projection": False,
}
SIGMA = PUBLISHED | {
    "interpolation_scale": 2,
    "sample_size": 128,
    "use_additional_conditions": False,
}
LEGACY_ONLY = (  # options that diffusers' current class no longer has
    "double_self_attention",
    "num_vector_embeds",
    "only_cross_attention",
    "use_linear_projection",
)


def tiny(heads=2, head_dim=12, layers=2, text=20, **more):
    return PUBLISHED | {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "num_layers": layers,
        "caption_channels": text,
        **more,
    }


# Name -> config, latent height and width. At "native" diffusers takes its stored table.
SIZES = {
    "native": Size(tiny(sample_size=12), 12, 12),
    "wide": Size(tiny(sample_size=64), 8, 12),
    "tall, no bias": Size(
        tiny(3, 20, 3, 28, sample_size=32, attention_bias=False, norm_eps=1e-3, in_channels=6),
        18,
        10,
    ),
    "one output": Size(tiny(4, 9, 1, 16, sample_size=64, out_channels=None, patch_size=3), 9, 6),
    "sized": Size(tiny(sample_size=128), 10, 6),
    "Sigma's": Size(
        tiny(3, 12, sample_size=128, use_additional_conditions=False, interpolation_scale=2), 8, 14
    ),
    "sized by flag": Size(
        tiny(3, 8, 2, 24, sample_size=64, use_additional_conditions=True, interpolation_scale=2),
        6,
        10,
    ),
}


def extras(config, r, batch):
    if not config.size_conditioned:
        return None
    return {
        "resolution": np.array([[512, 768], [1024, 960], [640, 1200]], np.float32)[:batch],
        "aspect_ratio": np.array([[0.67], [1.06], [0.53]], np.float32)[:batch],
    }


CASE = Case(
    family=pixart.FAMILY,
    torch_network=torch_class(PixArtTransformer2DModel, LEGACY_ONLY),
    sizes=SIZES,
    times=lambda config: (0.0, 499.25, 999.0),
    extras=extras,
    blocks=lambda model: model.transformer_blocks,
    adapted_is_slow=False,
    tangents=Tangents(
        size=SIZES["wide"],
        paths=("blocks/attn2/to_k/kernel",),
        times=(0.0, 499.25),
        tolerance=1e-7,
    ),
    bfloat16=SIZES["sized"],
    fresh=SIZES["native"],
    fresh_is_slow=False,
    layers="blocks/ff/linear_1/kernel",
    published={
        "512": Published(PUBLISHED | {"sample_size": 64}, 610_856_096, 603),
        "1024": Published(PUBLISHED | {"sample_size": 128}, 611_349_152, 611),
        "Sigma": Published(SIGMA, 610_856_096, 603),
    },
    rules=Rules(mesh={"fsdp": 128, "tensor": 2}, complete=True, replicated=("/bias",)),
    refused_in=PUBLISHED,
    refused=[
        ("norm_type", "ada_norm"),
        ("activation_fn", "geglu"),
        ("attention_type", "gated"),
        ("norm_elementwise_affine", True),
        ("only_cross_attention", True),
        ("double_self_attention", True),
        ("num_vector_embeds", 8),
        ("dropout", 0.1),
        ("caption_channels", None),
        ("cross_attention_dim", 768),
        ("quantization_config", {"load_in_4bit": True}),
    ],
)


class TestPixArt(BackboneSuite):
    case = CASE


def test_a_prompt_without_tokens_is_that_of_diffusers():
    both, cfg = loaded(CASE, "wide"), SIZES["wide"].config
    x, t, cond = both.inputs
    inputs = x, t, cond._replace(mask=0 * cond.mask)
    out, _ = both.raw(both.params, *inputs)
    # Near -10000 logits have steps of a thousandth, so rounding shows more than elsewhere.
    assert relative(out, CASE.torch_call(both.torch_network, cfg, *inputs)) <= 3e-4


@pytest.mark.slow
def test_remat_changes_nothing():
    cfg, both = SIZES["sized"].config, loaded(CASE, "sized")

    def out_and_grad(remat):
        call = CASE.raw(CASE.network(cfg, remat=remat).apply, CASE.config(cfg))

        def loss(params):
            out, _ = call(params, *both.inputs)
            return jax.numpy.square(out).mean(), out

        grads, out = jax.jit(jax.grad(loss, has_aux=True))(both.params)
        return flatten(grads) | {"out": out}

    with_remat, without = out_and_grad(True), out_and_grad(False)
    assert relative(with_remat.pop("out"), np.asarray(without.pop("out"))) <= 1e-6
    # On one scale for all: the gradient of a key's bias is zero up to rounding.
    largest = max(np.abs(g).max() for g in without.values())
    for name in without:
        assert np.abs(with_remat[name] - without[name]).max() <= 1e-6 * largest, name


def test_published_configs_are_read():
    small, large = (CASE.config(PUBLISHED | {"sample_size": n}) for n in (64, 128))
    assert (small.dim, small.position_scale, small.size_conditioned) == (1152, 1, False)
    assert (large.dim, large.position_scale, large.size_conditioned) == (1152, 2, True)
    assert not CASE.config(tiny(sample_size=128, use_additional_conditions=False)).size_conditioned


def test_missing_norm_type_is_refused_under_the_old_class_name():
    cfg = {k: v for k, v in PUBLISHED.items() if k != "norm_type"}
    with pytest.raises(InputError, match="norm_type"):
        CASE.config(cfg)
    CASE.config(cfg | {"_class_name": "PixArtTransformer2DModel"})


def test_bad_inputs_are_refused():
    both, size = loaded(CASE, "sized"), SIZES["sized"]
    x, t, cond = both.inputs
    call, added = CASE.raw(both.network.apply, CASE.config(size.config)), cond.extras
    swapped = added | {"aspect_ratio": added["resolution"]}
    for bad in (None, {}, {"resolution": added["resolution"]}, swapped):
        with pytest.raises(InputError, match="added_cond"):
            jax.eval_shape(call, both.params, x, t, cond._replace(extras=bad))
    with pytest.raises(InputError, match="multiples of the patch size 2"):
        jax.eval_shape(call, both.params, x[:, :-1], t, cond)
