"""Sana: the conformance suite, and what only this family has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import BackboneSuite, Case, Published, Rules, Size, Tangents, loaded, torch_class
from diffusers import SanaTransformer2DModel

from gadjax.errors import InputError
from gadjax.models import sana
from gadjax.models.sana.blocks import relu_linear_attention
from gadjax.types import Cond

# Configurations of the published repositories.
COMMON = {
    "_class_name": "SanaTransformer2DModel",
    "_diffusers_version": "0.33.0.dev0",
    "attention_bias": False,
    "attention_head_dim": 32,
    "caption_channels": 2304,
    "dropout": 0.0,
    "in_channels": 32,
    "interpolation_scale": None,
    "mlp_ratio": 2.5,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "out_channels": 32,
    "patch_size": 1,
    "sample_size": 32,
}
SMALL = {
    "cross_attention_dim": 1152,
    "cross_attention_head_dim": 72,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "num_layers": 28,
}
LARGE = {
    "cross_attention_dim": 2240,
    "cross_attention_head_dim": 112,
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "num_layers": 20,
}
NORMED = {"guidance_embeds": False, "qk_norm": "rms_norm_across_heads"}
SPRINT = NORMED | {"guidance_embeds": True, "guidance_embeds_scale": 0.1}
PUBLISHED = {
    "600M 512": Published(COMMON | SMALL | {"sample_size": 16}, 591_747_872, 548),
    "1600M 512": Published(COMMON | LARGE | {"sample_size": 16}, 1_604_462_752, 396),
    "1600M 1024": Published(COMMON | LARGE, 1_604_462_752, 396),
    "1.5 1.6B": Published(COMMON | LARGE | NORMED, 1_604_641_952, 476),
    "Sprint 0.6B": Published(COMMON | SMALL | SPRINT, 593_501_216, 664),
    "Sprint 1.6B": Published(COMMON | LARGE | SPRINT, 1_610_237_472, 480),
}


def tiny(heads=3, head_dim=8, layers=2, cross=(2, 10), text=20, **more):
    return COMMON | {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "num_cross_attention_heads": cross[0],
        "cross_attention_head_dim": cross[1],
        "num_layers": layers,
        "caption_channels": text,
        "in_channels": 4,
        "out_channels": 6,
        **more,
    }


# Name -> config, latent height and width.
SIZES = {
    "v1": Size(tiny(), 4, 7),
    "1.5": Size(
        tiny(2, 10, 3, (4, 6), 12, patch_size=2, attention_bias=True, norm_eps=1e-3)
        | NORMED
        | {"out_channels": None, "timestep_scale": 0.3, "mlp_ratio": 3.3},
        8,
        6,
    ),
    "sprint": Size(tiny(4, 4, 1, (3, 8), 12, out_channels=8) | SPRINT, 6, 3),
    "positions": Size(tiny(layers=1, interpolation_scale=2, sample_size=10), 5, 8),
}


def extras(config, r, batch):
    return (
        {"guidance": np.array([4.5, 1, 20], np.float32)[:batch]} if config.guidance_embeds else None
    )


CASE = Case(
    family=sana.FAMILY,
    torch_network=torch_class(SanaTransformer2DModel),
    sizes=SIZES,
    times=lambda config: (0.3, 0.9, 0.62) if config.guidance_embeds else (3.0, 499.25, 999.0),
    torch_times=lambda config, t: (
        t * np.float32(1 if config.guidance_embeds else config.timestep_scale)
    ),
    extras=extras,
    blocks=lambda model: model.transformer_blocks,
    tangents=Tangents(
        size=SIZES["sprint"],
        paths=(
            "blocks/attn1/to_k/kernel",
            "blocks/attn2/norm_q/scale",
            "blocks/ff/conv_depth/kernel",
        ),
        times=(0.3, 0.9),
        step=1e-6,  # short, because every relu is a kink
    ),
    bfloat16=SIZES["sprint"],
    fresh=SIZES["v1"],
    layers="blocks/ff/conv_point/kernel",
    published=PUBLISHED,
    rules=Rules(mesh={"fsdp": 32, "tensor": 2}),
    refused_in=PUBLISHED["1600M 1024"].config,
    refused=[
        ("norm_elementwise_affine", True),
        ("dropout", 0.1),
        ("qk_norm", "rms_norm"),
        ("cross_attention_dim", 2304),
        ("cross_attention_dim", None),
        ("quantization_config", {"load_in_4bit": True}),
    ],
)


class TestSana(BackboneSuite):
    case = CASE


def test_a_denoiser_passes_on_the_guidance_and_drops_a_learned_variance():
    def apply(params, x, t, text, mask, guidance, blocks=(), method="__call__"):
        return jnp.full((2, 1, 1, 6), guidance or 0), (params, x, t, text, mask, blocks, method)

    config = CASE.config(tiny())
    for given, expected_guidance in ((None, 0), ({}, 0), ({"guidance": 4.5}, 4.5)):
        cond = Cond("text", "mask", given)
        raw = sana.FAMILY.predictor(lambda *args: apply(*args)[0], config)("params", "x", "t", cond)
        assert raw.shape == (2, 1, 1, 4) and (raw == expected_guidance).all()
        tokens, rest = sana.FAMILY.features(apply)("params", "x", "t", cond)
        assert (tokens == expected_guidance).all() and rest == (
            "params",
            "x",
            "t",
            "text",
            "mask",
            (),
            "features",
        )


def test_a_query_with_zero_weights_has_derivatives():
    r = np.random.default_rng(0)
    q, k, v, dq = (r.standard_normal((1, 5, 2, 4)).astype(np.float32) for _ in range(4))
    q[0, 2] = -np.abs(q[0, 2])
    k[:, :, 1] = -np.abs(k[:, :, 1])  # a head without any answer

    def g(q, k, v):
        out, tangent = jax.jvp(lambda q: relu_linear_attention(q, k, v), (q,), (dq,))
        return jnp.sum(tangent**2), out

    grads, out = jax.jit(jax.grad(g, (0, 1, 2), has_aux=True))(q, k, v)
    assert (out[0, 2] == 0).all() and (out[:, :, 1] == 0).all() and (out[0, 1, 0] != 0).all()
    assert all(np.isfinite(grad).all() for grad in grads) and np.abs(grads[0]).max() > 0


def test_remat_recomputes_every_block():
    size = SIZES["v1"]
    for remat in (True, False):
        net = CASE.network(size.config, remat=remat)
        call = sana.FAMILY.predictor(net.apply, CASE.config(size.config))
        traced = jax.make_jaxpr(call)(net.abstract, *CASE.inputs(size))
        (scan,) = [eqn for eqn in traced.eqns if eqn.primitive.name == "scan"]
        recomputed = [
            str(eqn.params["jaxpr"])
            for eqn in scan.params["jaxpr"].eqns
            if eqn.primitive.name.startswith(("remat", "checkpoint"))
        ]  # norms are in any case, and have no products
        assert any("dot_general" in jaxpr for jaxpr in recomputed) == remat


def test_published_configs_are_read():
    configs = {name: CASE.config(cfg) for name, (cfg, _, _) in PUBLISHED.items()}
    assert {c.dim for c in configs.values()} == {1152, 2240}
    assert [n for n, c in configs.items() if c.guidance_embeds] == ["Sprint 0.6B", "Sprint 1.6B"]
    assert all(sana.FAMILY.extras(c, 2, 512, 768) is None for c in configs.values())


def test_positions_need_a_width_for_them():
    with pytest.raises(InputError, match="^interpolation_scale: found 2"):
        CASE.config(tiny(3, 5, interpolation_scale=2))


def test_bad_inputs_are_refused():
    for name in ("v1", "sprint", "1.5"):
        net, (x, t, cond) = loaded(CASE, name).network, loaded(CASE, name).inputs
        call = sana.FAMILY.predictor(net.apply, CASE.config(SIZES[name].config))
        for bad in (
            [None, {}, {"guidance": cond.extras["guidance"][:1]}]
            if name == "sprint"
            else [{"guidance": t}]
        ):
            with pytest.raises(InputError, match="^guidance: found .*; expected"):
                jax.eval_shape(call, net.abstract, x, t, cond._replace(extras=bad))
    with pytest.raises(InputError, match="multiples of the patch size 2"):
        jax.eval_shape(call, net.abstract, x[:, :-1], t, cond)
