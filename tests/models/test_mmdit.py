"""SD3's transformer: the conformance suite, and what only this family has."""

import jax
import jax.numpy as jnp
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
from diffusers import SD3Transformer2DModel

from gadjax.errors import InputError
from gadjax.formats.state_dict import tensors_from_params
from gadjax.models import mmdit

# Configurations of the published repositories.
MEDIUM_3 = {
    "_class_name": "SD3Transformer2DModel",
    "_diffusers_version": "0.29.0.dev0",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
MEDIUM_35 = MEDIUM_3 | {
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
LARGE_35 = MEDIUM_3 | {
    "caption_projection_dim": 2432,
    "num_attention_heads": 38,
    "num_layers": 38,
    "qk_norm": "rms_norm",
}
PUBLISHED = {
    "3-medium": Published(MEDIUM_3, 2_028_328_000, 683),
    "3.5-medium": Published(MEDIUM_35, 2_243_171_520, 909),
    "3.5-large": Published(LARGE_35, 8_056_627_520, 1227),
}


def tiny(heads, head_dim, layers, *, dual=0, qk_norm=None, joint=20, pooled=14, table=6, **more):
    more = {"dual_attention_layers": list(range(dual))} | more if dual else more
    return MEDIUM_3 | {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "caption_projection_dim": heads * head_dim,
        "num_layers": layers,
        "joint_attention_dim": joint,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": table,
        "qk_norm": qk_norm,
        "in_channels": 5,
        "out_channels": 5,
        "sample_size": 8,
        **more,
    }


# Name -> config, latent height and width.
SIZES = {
    "3": Size(tiny(2, 12, 4), 8, 8),
    "3.5, wide": Size(
        tiny(3, 8, 5, dual=2, qk_norm="rms_norm", joint=28, pooled=10, table=7), 6, 10
    ),
    "all but one dual": Size(tiny(2, 8, 3, dual=2, qk_norm="rms_norm", table=5), 10, 10),
    "all dual, no norm, tall": Size(tiny(1, 12, 2, dual=2, patch_size=1, table=9), 7, 4),
    "norm alone": Size(tiny(4, 6, 2, qk_norm="rms_norm", joint=12, out_channels=None), 4, 12),
}


CASE = Case(
    family=mmdit.FAMILY,
    torch_network=torch_class(SD3Transformer2DModel),
    sizes=SIZES,
    times=lambda config: (1.0, 499.25, 1000.0),
    extras=lambda config, r, batch: {
        "pooled": r.standard_normal((batch, config.pooled_dim), np.float32)
    },
    blocks=lambda model: model.transformer_blocks,
    tokens=lambda both: both[1],
    tangents=Tangents(
        size=Size(tiny(2, 8, 2, dual=1, qk_norm="rms_norm", table=4), 4, 6),
        paths=("dual_blocks/attn_context/to_k/kernel",),
        times=(1.0, 499.25),
        length=3,
    ),
    bfloat16=SIZES["all but one dual"],
    fresh=SIZES["all but one dual"],
    layers="dual_blocks/ff/linear_1/kernel",
    untrained=("pos_embed/pos_embed",),
    published=PUBLISHED,
    rules=Rules(mesh={"fsdp": 64, "tensor": 8}, complete=True, replicated=("/bias", "/scale")),
    refused_in=MEDIUM_3,
    refused=[
        ("qk_norm", "layer_norm"),
        ("dual_attention_layers", [0, 2]),
        ("dual_attention_layers", [1, 2]),
        ("dual_attention_layers", list(range(25))),
        ("caption_projection_dim", 1152),
        ("out_channels", 32),
        ("pos_embed_max_size", None),
        ("num_layers", 1),
        ("num_layers", "24"),
        ("attention_head_dim", 0),
        ("dual_layers", 3),
        ("quantization_config", {"load_in_4bit": True}),
    ],
)


class TestMMDiT(BackboneSuite):
    case = CASE
    test_kv_cache_stands_for_the_prompt = None  # the text's stream changes from layer to layer

    def check_fresh(self, flat):
        table = CASE.torch_network(CASE.fresh.config).state_dict()["pos_embed.pos_embed"].numpy()
        assert relative(flat["pos_embed/pos_embed"], table) <= 1e-6


def test_gradients_are_those_of_torch_and_the_table_of_positions_has_none():
    """Gradients under rematerialisation."""
    cfg = tiny(2, 8, 2, dual=1, qk_norm="rms_norm", table=4)
    model, (x, t, cond) = CASE.random_torch_network(cfg), CASE.inputs(Size(cfg, 6, 4))
    call = mmdit.FAMILY.predictor(CASE.network(cfg).apply, CASE.config(cfg))
    weights = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    others = (torch.tensor(a) for a in (cond.text, cond.extras["pooled"], t))
    out = model(torch.tensor(x).permute(0, 3, 1, 2), *others).sample
    (out.permute(0, 2, 3, 1) * torch.tensor(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda p: jnp.sum(call(p, x, t, cond) * weights)))(
        CASE.params(model, cfg)
    )
    ours = dict(tensors_from_params(grads, mmdit.FAMILY.keymap_of(CASE.config(cfg))))
    assert not ours.pop("pos_embed.pos_embed").any()
    expected = {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None}
    # What the last block would answer to the text is not read: torch gives none or zeros.
    for key in ours:
        if key not in expected:
            assert not ours[key].any(), key
    # On one scale for all: the gradient of a key's bias is zero up to rounding.
    largest = max(np.abs(g).max() for g in expected.values())
    worst = max(np.abs(ours[key] - g).max() / largest for key, g in expected.items())
    print(f"gradients {worst:.2e}")
    assert worst <= 1e-5


def test_published_configs_are_read():
    three, three_five, large = (CASE.config(cfg) for cfg, _, _ in PUBLISHED.values())
    assert (large.dim, large.dual_layers, large.qk_norm) == (2432, 0, "rms_norm")
    assert (three.dim, three.dual_layers, three.qk_norm) == (1536, 0, None)
    assert (three_five.dim, three_five.dual_layers, three_five.qk_norm) == (1536, 13, "rms_norm")
    assert three_five.sample_size == 128 and three_five.in_channels == 16


def test_bad_inputs_are_refused():
    net, (x, t, cond) = loaded(CASE, "3").network, loaded(CASE, "3").inputs
    config = CASE.config(SIZES["3"].config)
    call = mmdit.FAMILY.predictor(net.apply, config)
    for tall, wide in ((14, 2), (2, 14)):
        larger = np.zeros((3, tall, wide, 5), np.float32)
        with pytest.raises(
            InputError, match=f"^latents: found {tall} x {wide}; expected at most 12 x 12, "
        ):
            jax.eval_shape(call, net.abstract, larger, t, cond)
    with pytest.raises(InputError, match="multiples of the patch size 2"):
        jax.eval_shape(call, net.abstract, x[:, :-1], t, cond)
    pooled = cond.extras["pooled"]
    for bad in (None, pooled[:, 1:], pooled[1:]):
        with pytest.raises(InputError, match=r"^pooled: found .* of shape \(3, 14\)"):
            mmdit.FAMILY.extras(config, 3, 64, 64, bad)
