"""Sana's transformer against diffusers' class: values, derivatives, key names, shardings."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel
from text_kv import assert_text_kv_matches

from gadjax.diffusion import geometry
from gadjax.errors import InputError
from gadjax.formats.state_dict import expected_shapes, params_from_tensors, tensors_from_params
from gadjax.models.module import functional
from gadjax.models.params import cast, flatten
from gadjax.models.sana import (
    CLASS_NAMES,
    KEYMAP,
    RULES,
    Config,
    build,
    extras,
    features,
    predictor,
)
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
# Name -> config, parameters, tensors.
PUBLISHED = {
    "600M 512": (COMMON | SMALL | {"sample_size": 16}, 591_747_872, 548),
    "1600M 512": (COMMON | LARGE | {"sample_size": 16}, 1_604_462_752, 396),
    "1600M 1024": (COMMON | LARGE, 1_604_462_752, 396),
    "1.5 1.6B": (COMMON | LARGE | NORMED, 1_604_641_952, 476),
    "Sprint 0.6B": (COMMON | SMALL | SPRINT, 593_501_216, 664),
    "Sprint 1.6B": (COMMON | LARGE | SPRINT, 1_610_237_472, 480),
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
CASES = {
    "v1": (tiny(), 4, 7),
    "1.5": (
        tiny(2, 10, 3, (4, 6), 12, patch_size=2, attention_bias=True, norm_eps=1e-3)
        | NORMED
        | {"out_channels": None, "timestep_scale": 0.3, "mlp_ratio": 3.3},
        8,
        6,
    ),
    "sprint": (tiny(4, 4, 1, (3, 8), 12, out_channels=8) | SPRINT, 6, 3),
    "positions": (tiny(layers=1, interpolation_scale=2, sample_size=10), 5, 8),
}


def torch_model(cfg):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SanaTransformer2DModel(**{k: v for k, v in cfg.items() if k[0] != "_"}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def to_params(model, cfg, dtype=np.float32):
    tensors = {k: v.numpy().astype(dtype) for k, v in model.state_dict().items()}
    return params_from_tensors(tensors, functional(build(Config.from_dict(cfg))).abstract, KEYMAP)


def inputs(cfg, height, width, batch=3, length=7, seed=0):
    """Inputs of the network: x, t, text, mask, guidance."""
    r = np.random.default_rng(seed)
    guided = cfg.get("guidance_embeds", False)
    x = r.standard_normal((batch, height, width, cfg["in_channels"]), np.float32)
    t = np.array([0.3, 0.9, 0.62] if guided else [3.0, 499.25, 999.0], np.float32)[:batch]
    text = r.standard_normal((batch, length, cfg["caption_channels"]), np.float32)
    mask = (np.arange(length) < np.array([[length], [3], [1]])[:batch]).astype(np.int32)
    return x, t, text, mask, np.array([4.5, 1, 20], np.float32)[:batch] if guided else None


def torch_call(model, x, t, text, mask, guidance):
    """Call diffusers' network as its pipelines do: its output, and the tokens after every block."""
    if guidance is None:
        t = t * np.float32(model.config.timestep_scale)
    else:
        guidance = torch.tensor(guidance) * model.config.guidance_embeds_scale
    tokens_by_block = []
    hooks = [
        block.register_forward_hook(
            lambda block, given, tokens: tokens_by_block.append(tokens.numpy())
        )
        for block in model.transformer_blocks
    ]
    with torch.no_grad():
        out = model(
            torch.tensor(x).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.tensor(text),
            timestep=torch.tensor(t),
            guidance=guidance,
            encoder_attention_mask=torch.tensor(mask),
        ).sample
    for hook in hooks:
        hook.remove()
    return out.permute(0, 2, 3, 1).numpy(), tokens_by_block


def relative(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", CASES)
def test_output_and_features_are_those_of_diffusers(name):
    cfg, height, width = CASES[name]
    model, args = torch_model(cfg), inputs(cfg, height, width)
    params, net = to_params(model, cfg), functional(build(Config.from_dict(cfg)))
    apply = jax.jit(net.apply)
    out, tokens = (
        apply(params, *args),
        jax.jit(partial(net.apply, method="features"))(params, *args),
    )
    assert_text_kv_matches(net, params, args, out, tokens)
    expected, tokens_by_block = torch_call(model, *args)
    assert out.shape == expected.shape and out.dtype == tokens.dtype == jnp.float32
    half = (len(tokens_by_block) + 1) // 2 - 1
    errors = [relative(tokens, reference) for reference in tokens_by_block]
    print(f"{name}: output {relative(out, expected):.2e}, features {errors[half]:.2e}")
    assert relative(out, expected) <= 1e-5 and errors.pop(half) <= 1e-5
    assert all(error > 1e-3 for error in errors)
    # The test is sensitive: every argument changes the output.
    others = [(1, args[1][::-1]), (3, np.ones_like(args[3]))]
    others += [(4, args[4][::-1])] if args[4] is not None else []
    for i, other in others:
        changed = apply(params, *args[:i], other, *args[i + 1 :])
        assert relative(changed, expected) > 1e-3


def test_a_denoiser_passes_on_the_guidance_and_drops_a_learned_variance():
    def apply(params, x, t, text, mask, guidance, method="__call__"):
        return jnp.full((2, 1, 1, 6), guidance or 0), (params, x, t, text, mask, method)

    config = Config.from_dict(tiny())
    for given, expected_guidance in ((None, 0), ({}, 0), ({"guidance": 4.5}, 4.5)):
        cond = Cond("text", "mask", given)
        raw = predictor(lambda *args: apply(*args)[0], config)("params", "x", "t", cond)
        assert raw.shape == (2, 1, 1, 4) and (raw == expected_guidance).all()
        tokens, rest = features(apply)("params", "x", "t", cond)
        assert (tokens == expected_guidance).all() and rest == (
            "params",
            "x",
            "t",
            "text",
            "mask",
            "features",
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", ["v1", "sprint"])
def test_parameters_survive_the_round_trip(name, dtype):
    model = torch_model(CASES[name][0])
    back = dict(tensors_from_params(to_params(model, CASES[name][0], dtype), KEYMAP))
    state = model.state_dict()
    assert set(back) == set(state)
    for key, value in state.items():
        assert back[key].dtype == dtype and np.array_equal(back[key], value.numpy().astype(dtype))


def test_derivatives_are_those_of_central_differences():
    cfg, height, width = CASES["sprint"]
    params, args = to_params(torch_model(cfg), cfg), inputs(cfg, height, width, batch=2)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(np.float64), params)
        net = functional(build(Config.from_dict(cfg), dtype=jnp.float64))
        x, *rest = (a.astype(np.float64) for a in args)
        r = np.random.default_rng(1)
        u, v = (r.standard_normal(x.shape) for _ in range(2))

        def g(params, x):  # a scalar that holds a forward derivative
            out, tangent = geometry.tangent(lambda x: net.apply(params, x, *rest), x, v)
            return jnp.sum(jnp.sin(tangent)), (out, tangent)

        run = jax.jit(jax.value_and_grad(g, (0, 1), has_aux=True))
        (_, (_, tangent)), (slopes, slope_x) = jax.device_get(run(params, x))

        def difference(along_params, along_x, h=1e-6):  # short, because every relu is a kink
            def at(s):
                there = jax.tree.map(lambda p, d: p + s * d, params, along_params)
                return run(there, x + s * along_x)[0]

            ahead, behind = at(h), at(-h)
            return jax.tree.map(lambda a, b: (np.asarray(a) - b) / (2 * h), ahead, behind)

        still = jax.tree.map(np.zeros_like, params)
        first = relative(tangent, difference(still, v)[1][0])
        second = [relative(np.vdot(slope_x, u), difference(still, u)[0])]
        for name in ("attn1/to_k/kernel", "attn2/norm_q/scale", "ff/conv_depth/kernel"):
            one = jax.tree.map(np.zeros_like, params)
            group, layer, last = name.split("/")
            one["blocks"][group][layer][last] = w = r.standard_normal(
                params["blocks"][group][layer][last].shape
            )
            found = np.vdot(slopes["blocks"][group][layer][last], w)
            second.append(relative(found, difference(one, 0 * x)[0]))
    print(f"jvp {first:.2e}, grads of jvp", *(f"{error:.2e}" for error in second))
    assert max(first, *second) < 1e-6


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


def test_remat_recomputes_each_block():
    cfg, height, width = CASES["v1"]
    for remat in (True, False):
        net = functional(build(Config.from_dict(cfg), remat=remat))
        traced = jax.make_jaxpr(net.apply)(net.abstract, *inputs(cfg, height, width))
        (scan,) = [eqn for eqn in traced.eqns if eqn.primitive.name == "scan"]
        inner = [eqn.primitive.name for eqn in scan.params["jaxpr"].eqns]
        assert any(name.startswith(("remat", "checkpoint")) for name in inner) == remat


def test_bfloat16_is_close():
    cfg, height, width = CASES["sprint"]
    model, args = torch_model(cfg), inputs(cfg, height, width)
    exact = torch_call(model, *args)[0]
    net = functional(build(Config.from_dict(cfg), dtype=jnp.bfloat16))
    out = jax.jit(net.apply)(cast(to_params(model, cfg), jnp.bfloat16), *args)
    assert out.dtype == jnp.bfloat16
    a, b = np.asarray(out, np.float32).ravel(), exact.ravel()
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    print(f"cosine {cosine:.6f}")
    assert cosine > 0.999


@cache
def published(name):
    return functional(build(Config.from_dict(PUBLISHED[name][0]))).abstract


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_inventory(name):
    cfg, count, tensors = PUBLISHED[name]
    abstract = published(name)
    with torch.device("meta"):
        model = SanaTransformer2DModel(**{k: v for k, v in cfg.items() if k[0] != "_"})
    found = {k: shape for k, (_, _, shape) in expected_shapes(abstract, KEYMAP).items()}
    assert found == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert len(found) == tensors
    assert sum(leaf.size for leaf in flatten(abstract).values()) == count


def test_rules_name_every_large_leaf_and_divide_it():
    mesh, used = {"fsdp": 32, "tensor": 2, None: 1}, set()
    for name in PUBLISHED:
        for path, leaf in flatten(published(name)).items():
            matching = [(p, spec) for p, spec in RULES if re.search(p, path)]
            assert len(matching) <= 1 and (matching or leaf.size < 2**16), path
            for pattern, spec in matching:
                used.add(pattern)
                assert len(spec) == leaf.ndim and "fsdp" in spec, path
                assert all(n % mesh[a] == 0 for n, a in zip(leaf.shape, spec, strict=True)), path
    assert used == {p for p, _ in RULES}


def test_published_configs_are_read():
    configs = {name: Config.from_dict(cfg) for name, (cfg, _, _) in PUBLISHED.items()}
    assert COMMON["_class_name"] in CLASS_NAMES
    assert {c.dim for c in configs.values()} == {1152, 2240}
    assert [n for n, c in configs.items() if c.guidance_embeds] == ["Sprint 0.6B", "Sprint 1.6B"]
    assert all(extras(c, 2, 512, 768) is None for c in configs.values())


@pytest.mark.parametrize(
    "key, value",
    [
        ("norm_elementwise_affine", True),
        ("dropout", 0.1),
        ("qk_norm", "rms_norm"),
        ("cross_attention_dim", 2304),
        ("cross_attention_dim", None),
        ("quantization_config", {"load_in_4bit": True}),
    ],
)
def test_unsupported_option_is_named(key, value):
    with pytest.raises(InputError, match=f"^{key}: found .*; expected"):
        Config.from_dict(PUBLISHED["1600M 1024"][0] | {key: value})


def test_positions_need_a_width_for_them():
    with pytest.raises(InputError, match="^interpolation_scale: found 2"):
        Config.from_dict(tiny(3, 5, interpolation_scale=2))


def test_bad_inputs_are_refused():
    for name in ("v1", "sprint", "1.5"):
        cfg, height, width = CASES[name]
        config = Config.from_dict(cfg)
        net = functional(build(config))
        x, t, text, mask, guidance = inputs(cfg, height, width)
        call = predictor(net.apply, config)
        for bad in (
            [None, {}, {"guidance": guidance[:1]}] if name == "sprint" else [{"guidance": t}]
        ):
            with pytest.raises(InputError, match="^guidance: found .*; expected"):
                jax.eval_shape(call, net.abstract, x, t, Cond(text, mask, bad))
    with pytest.raises(InputError, match="multiples of the patch size 2"):
        jax.eval_shape(net.apply, net.abstract, x[:, :-1], t, text, mask)


@pytest.mark.slow
def test_fresh_parameters_are_usable():
    cfg, height, width = CASES["v1"]
    net = functional(build(Config.from_dict(cfg)))

    @jax.jit
    def run(key, args):
        params = net.init(key)
        return params, net.apply(params, *args)

    # This generator compiles faster.
    params, out = run(jax.random.key(0, impl="rbg"), inputs(cfg, height, width))
    assert {k: v.shape for k, v in flatten(params).items()} == {
        k: v.shape for k, v in flatten(net.abstract).items()
    }
    assert np.isfinite(out).all() and np.abs(out).max() > 0
    kernels = params["blocks"]["ff"]["conv_point"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])  # layers are drawn independently
