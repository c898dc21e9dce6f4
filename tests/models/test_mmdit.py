"""SD3's transformer against diffusers' class: values, derivatives, key names."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from gadjax.diffusion import geometry
from gadjax.errors import InputError
from gadjax.formats.state_dict import expected_shapes, params_from_tensors, tensors_from_params
from gadjax.models import mmdit
from gadjax.models.mmdit import Config, build, keymap
from gadjax.models.module import functional
from gadjax.models.params import cast, flatten, unflatten
from gadjax.types import Cond

# Configurations of the two published repositories.
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
PUBLISHED = {"3-medium": MEDIUM_3, "3.5-medium": MEDIUM_35}


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
CASES = {
    "3": (tiny(2, 12, 4), 8, 8),
    "3.5, wide": (tiny(3, 8, 5, dual=2, qk_norm="rms_norm", joint=28, pooled=10, table=7), 6, 10),
    "all but one dual": (tiny(2, 8, 3, dual=2, qk_norm="rms_norm", table=5), 10, 10),
    "all dual, no norm, tall": (tiny(1, 12, 2, dual=2, patch_size=1, table=9), 7, 4),
    "norm alone": (tiny(4, 6, 2, qk_norm="rms_norm", joint=12, out_channels=None), 4, 12),
}


def torch_model(cfg):
    """diffusers' network with all tensors random, the position table too."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given = {k: v for k, v in cfg.items() if not k.startswith("_")}
    model = SD3Transformer2DModel(**given).eval()
    with torch.no_grad():
        for p in model.state_dict().values():
            p.add_(0.1 * torch.randn_like(p))
    return model


@cache
def abstract(config):
    return functional(build(config)).abstract


def to_params(model, cfg):
    config = Config.from_dict(cfg)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    return params_from_tensors(tensors, abstract(config), keymap(config))


def inputs(cfg, height, width, batch=3, length=7):
    r = np.random.default_rng(0)
    x = r.standard_normal((batch, height, width, cfg["in_channels"]), np.float32)
    t = np.array([1.0, 499.25, 1000.0], np.float32)[:batch]
    text = r.standard_normal((batch, length, cfg["joint_attention_dim"]), np.float32)
    pooled = r.standard_normal((batch, cfg["pooled_projection_dim"]), np.float32)
    return x, t, text, pooled


def torch_call(model, x, t, text, pooled):
    with torch.no_grad():
        out = model(
            torch.tensor(x).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.tensor(text),
            pooled_projections=torch.tensor(pooled),
            timestep=torch.tensor(t),
        )
    return out.sample.permute(0, 2, 3, 1).numpy()


def relative(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


@cache
def network(name):
    """Configuration, functions and compiled prediction of a case."""
    config = Config.from_dict(CASES[name][0])
    net = functional(build(config))
    return config, net, jax.jit(mmdit.FAMILY.predictor(net.apply, config))


def cond(text, pooled):
    return Cond(text, None, {"pooled": pooled})  # a mask is not read


@pytest.mark.parametrize("name", CASES)
def test_output_is_that_of_diffusers(name):
    cfg, height, width = CASES[name]
    model, (x, t, text, pooled) = torch_model(cfg), inputs(cfg, height, width)
    params, call = to_params(model, cfg), network(name)[2]
    out = call(params, x, t, cond(text, pooled))
    expected = torch_call(model, x, t, text, pooled)
    assert out.shape == expected.shape and out.dtype == jnp.float32
    error = relative(out, expected)
    print(f"{name}: {error:.2e}")
    assert error <= 1e-5
    # The test is sensitive: another time, text or pooled vector changes the output.
    for other in (
        (t[::-1], cond(text, pooled)),
        (t, cond(text[::-1], pooled)),
        (t, cond(text, pooled[::-1])),
    ):
        assert relative(call(params, x, *other), expected) > 1e-3


@pytest.mark.parametrize("name", ["3", "3.5, wide"])
def test_features_are_the_tokens_half_way(name):
    """Features inside the only stack, and inside the second of two, against hooks in diffusers."""
    cfg, height, width = CASES[name]
    model, (x, t, text, pooled), tokens_by_block = torch_model(cfg), inputs(cfg, height, width), []
    for block in model.transformer_blocks:
        block.register_forward_hook(
            lambda block, given, both: tokens_by_block.append(both[1].numpy())
        )
    torch_call(model, x, t, text, pooled)
    out = jax.jit(mmdit.FAMILY.features(network(name)[1].apply))(
        to_params(model, cfg), x, t, cond(text, pooled)
    )
    half = (len(tokens_by_block) + 1) // 2 - 1
    assert out.shape == tokens_by_block[half].shape and out.dtype == jnp.float32
    errors = [relative(out, tokens) for tokens in tokens_by_block]
    print(f"{name}: {errors[half]:.2e}")
    assert errors.pop(half) <= 1e-5
    assert all(error > 1e-3 for error in errors)


@pytest.mark.parametrize("name", CASES)
def test_parameters_survive_the_round_trip(name):
    config = Config.from_dict(CASES[name][0])
    state = torch_model(CASES[name][0]).state_dict()
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        tensors = {k: v.numpy().astype(dtype) for k, v in state.items()}
        params = params_from_tensors(tensors, abstract(config), keymap(config))
        back = dict(tensors_from_params(params, keymap(config)))
        assert set(back) == set(tensors)
        for key, value in tensors.items():
            assert back[key].dtype == dtype and np.array_equal(back[key], value), key


@pytest.mark.parametrize(
    "name, params, tensors",
    [("3-medium", 2_028_328_000, 683), ("3.5-medium", 2_243_171_520, 909)],
)
def test_published_inventory(name, params, tensors):
    cfg = PUBLISHED[name]
    config = Config.from_dict(cfg)
    with torch.device("meta"):
        model = SD3Transformer2DModel(**{k: v for k, v in cfg.items() if not k.startswith("_")})
    found = {
        k: shape for k, (_, _, shape) in expected_shapes(abstract(config), keymap(config)).items()
    }
    assert found == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert len(found) == tensors
    flat = flatten(abstract(config))
    frozen = [p for p in flat if any(re.search(f, p) for f in mmdit.FAMILY.frozen)]
    assert frozen == ["pos_embed/pos_embed"]
    assert sum(leaf.size for path, leaf in flat.items() if path not in frozen) == params


def test_each_parameter_has_one_rule_that_divides_it():
    mesh, used = {"fsdp": 64, "tensor": 8}, set()
    for cfg in PUBLISHED.values():
        for path, leaf in flatten(abstract(Config.from_dict(cfg))).items():
            matching = [(p, spec) for p, spec in mmdit.FAMILY.rules if re.search(p, path)]
            assert len(matching) == 1, path
            pattern, spec = matching[0]
            used.add(pattern)
            if not path.endswith(("/bias", "/scale")):
                assert len(spec) == leaf.ndim and "fsdp" in spec, path
                for size, axis in zip(leaf.shape, spec, strict=True):
                    assert axis is None or size % mesh[axis] == 0, path
    assert used == {p for p, _ in mmdit.FAMILY.rules}


def central(f, x, along, h=1e-4):
    """Derivative of f at x, of fourth order in h."""
    far = f(x + 2 * h * along) - f(x - 2 * h * along)
    return (8 * (f(x + h * along) - f(x - h * along)) - far) / (12 * h)


def test_derivatives_are_those_of_central_differences():
    cfg = tiny(2, 8, 2, dual=1, qk_norm="rms_norm", table=4)
    flat, args = flatten(to_params(torch_model(cfg), cfg)), inputs(cfg, 4, 6, batch=2, length=3)
    path = "dual_blocks/attn_context/to_k/kernel"
    with jax.enable_x64(True):
        flat = cast(flat, jnp.float64)
        net = functional(build(Config.from_dict(cfg), dtype=jnp.float64))
        x, *rest = (jnp.asarray(a, jnp.float64) for a in args)
        leaf, r = flat[path], np.random.default_rng(1)
        v, u = (jnp.asarray(r.standard_normal(a.shape)) for a in (x, leaf))

        @jax.jit
        def everything(x, leaf):
            def loss(leaf):  # a scalar that holds a forward derivative
                params = unflatten(flat | {path: leaf})
                out, tangent = geometry.tangent(lambda x: net.apply(params, x, *rest), x, v)
                return jnp.sum(jnp.sin(tangent)), (out, tangent)

            (value, (out, tangent)), grad = jax.value_and_grad(loss, has_aux=True)(leaf)
            return {"out": out, "tangent": tangent, "loss": value, "grad": grad}

        values = everything(x, leaf)
        first = relative(values["tangent"], central(lambda x: everything(x, leaf)["out"], x, v))
        slope = central(lambda leaf: everything(x, leaf)["loss"], leaf, u)
        second = relative(jnp.vdot(values["grad"], u), slope)
    print(f"jvp {first:.2e}, grad of jvp {second:.2e}")
    assert max(first, second) <= 1e-6


def test_gradients_are_those_of_torch_and_the_table_of_positions_has_none():
    """Gradients under rematerialisation."""
    cfg = tiny(2, 8, 2, dual=1, qk_norm="rms_norm", table=4)
    model, (x, *rest) = torch_model(cfg), inputs(cfg, 6, 4)
    config = Config.from_dict(cfg)
    net = functional(build(config))
    weights = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    out = model(
        torch.tensor(x).permute(0, 3, 1, 2), *(torch.tensor(a) for a in (rest[1], rest[2], rest[0]))
    ).sample
    (out.permute(0, 2, 3, 1) * torch.tensor(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, x, *rest) * weights)))(
        to_params(model, cfg)
    )
    ours = dict(tensors_from_params(grads, keymap(config)))
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


def test_bfloat16_is_close():
    cfg, height, width = CASES["all but one dual"]
    model, args = torch_model(cfg), inputs(cfg, height, width)
    params, exact = to_params(model, cfg), torch_call(model, *args)
    net = functional(build(Config.from_dict(cfg), dtype=jnp.bfloat16))
    out = jax.jit(net.apply)(cast(params, jnp.bfloat16), *args)
    assert out.dtype == jax.eval_shape(net.apply, params, *args).dtype == jnp.bfloat16
    a, b = np.asarray(out, np.float32).ravel(), exact.ravel()
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    print(f"cosine {cosine:.6f}")
    assert cosine > 0.999


def test_published_configs_are_read():
    three, three_five = (Config.from_dict(cfg) for cfg in PUBLISHED.values())
    assert (three.dim, three.dual_layers, three.qk_norm) == (1536, 0, None)
    assert (three_five.dim, three_five.dual_layers, three_five.qk_norm) == (1536, 13, "rms_norm")
    assert three_five.sample_size == 128 and three_five.in_channels == 16
    assert MEDIUM_3["_class_name"] in mmdit.FAMILY.class_names


@pytest.mark.parametrize(
    "key, value",
    [
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
def test_unsupported_option_is_named(key, value):
    with pytest.raises(InputError, match=f"^{key}: found [^\n]*; expected [^\n]*$"):
        Config.from_dict(MEDIUM_3 | {key: value})


def test_bad_inputs_are_refused():
    cfg, height, width = CASES["3"]
    config, net, _ = network("3")
    x, *rest = inputs(cfg, height, width)
    for tall, wide in ((14, 2), (2, 14)):
        larger = np.zeros((3, tall, wide, 5), np.float32)
        with pytest.raises(
            InputError, match=f"^latents: found {tall} x {wide}; expected at most 12 x 12, "
        ):
            jax.eval_shape(net.apply, net.abstract, larger, *rest)
    with pytest.raises(InputError, match="multiples of the patch size 2"):
        jax.eval_shape(net.apply, net.abstract, x[:, :-1], *rest)
    for bad in (None, rest[-1][:, 1:], rest[-1][1:]):
        with pytest.raises(InputError, match=r"^pooled: found .* of shape \(3, 14\)"):
            mmdit.FAMILY.extras(config, 3, 64, 64, bad)


@pytest.mark.slow
def test_fresh_parameters_are_usable():
    cfg, height, width = CASES["all but one dual"]
    _, net, call = network("all but one dual")
    params = jax.jit(net.init)(jax.random.key(0, impl="rbg"))  # compiles faster
    assert {k: v.shape for k, v in flatten(params).items()} == {
        k: v.shape for k, v in flatten(net.abstract).items()
    }
    x, t, *rest = inputs(cfg, height, width)
    out = call(params, x, t, cond(*rest))
    assert np.isfinite(out).all() and np.abs(out).max() > 0
    kernels = params["dual_blocks"]["ff"]["linear_1"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])  # layers are drawn independently
    fresh = SD3Transformer2DModel(**{k: v for k, v in cfg.items() if not k.startswith("_")})
    table = fresh.state_dict()["pos_embed.pos_embed"].numpy()
    assert relative(params["pos_embed"]["pos_embed"], table) <= 1e-6
