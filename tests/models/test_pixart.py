import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from text_kv import assert_text_kv_matches

from gadjax.diffusion import geometry
from gadjax.errors import InputError
from gadjax.formats.state_dict import expected_shapes, params_from_tensors, tensors_from_params
from gadjax.models.module import functional
from gadjax.models.params import cast, flatten
from gadjax.models.pixart import KEYMAP, RULES, Config, build
from gadjax.models.pixart.net import CLASS_NAMES

# Configurations of the two published repositories.
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
CASES = {
    "native": (tiny(sample_size=12), 12, 12),
    "wide": (tiny(sample_size=64), 8, 12),
    "tall, no bias": (
        tiny(3, 20, 3, 28, sample_size=32, attention_bias=False, norm_eps=1e-3, in_channels=6),
        18,
        10,
    ),
    "one output": (tiny(4, 9, 1, 16, sample_size=64, out_channels=None, patch_size=3), 9, 6),
    "sized": (tiny(sample_size=128), 10, 6),
    "sized by flag": (
        tiny(3, 8, 2, 24, sample_size=64, use_additional_conditions=True, interpolation_scale=2),
        6,
        10,
    ),
}


def torch_model(cfg):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        **{k: v for k, v in cfg.items() if k not in (*LEGACY_ONLY, "_class_name")}
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def to_params(model, cfg):
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    return params_from_tensors(tensors, functional(build(Config.from_dict(cfg))).abstract, KEYMAP)


def inputs(cfg, height, width, batch=3, length=7, seed=0):
    r = np.random.default_rng(seed)
    x = r.standard_normal((batch, height, width, cfg["in_channels"]), np.float32)
    t = np.array([0.0, 499.25, 999.0], np.float32)[:batch]
    text = r.standard_normal((batch, length, cfg["caption_channels"]), np.float32)
    mask = (np.arange(length) < np.array([[length], [3], [1]])[:batch]).astype(np.int32)
    added = {
        "resolution": np.array([[512, 768], [1024, 960], [640, 1200]], np.float32)[:batch],
        "aspect_ratio": np.array([[0.67], [1.06], [0.53]], np.float32)[:batch],
    }
    return x, t, text, mask, added if Config.from_dict(cfg).size_conditioned else None


def torch_call(model, x, t, text, mask, added):
    with torch.no_grad():
        return (
            model(
                torch.tensor(x).permute(0, 3, 1, 2),
                encoder_hidden_states=torch.tensor(text),
                timestep=torch.tensor(t),
                encoder_attention_mask=torch.tensor(mask),
                added_cond_kwargs=added and {k: torch.tensor(v) for k, v in added.items()},
            )
            .sample.permute(0, 2, 3, 1)
            .numpy()
        )


def relative(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", CASES)
def test_output_is_that_of_diffusers(name):
    cfg, height, width = CASES[name]
    model = torch_model(cfg)
    args = inputs(cfg, height, width)
    params, net = to_params(model, cfg), functional(build(Config.from_dict(cfg)))
    apply = jax.jit(net.apply)
    out = apply(params, *args)
    expected = torch_call(model, *args)
    assert out.shape == expected.shape and out.dtype == jnp.float32
    error = relative(out, expected)
    print(f"{name}: {error:.2e}")
    assert error <= 1e-5
    # The test is sensitive: the output depends on the mask and on the time.
    for i, other in ((1, args[1][::-1]), (3, np.ones_like(args[3]))):
        changed = apply(params, *args[:i], other, *args[i + 1 :])
        assert relative(changed, expected) > 1e-3


@pytest.mark.parametrize("name", ["wide", "tall, no bias", "one output", "sized"])
def test_features_are_the_tokens_half_way(name):
    """Features after 1 of 2, 2 of 3 and 1 of 1 blocks, against hooks in diffusers."""
    cfg, height, width = CASES[name]
    model, args, tokens_by_block = torch_model(cfg), inputs(cfg, height, width), []
    for block in model.transformer_blocks:
        block.register_forward_hook(
            lambda block, given, tokens: tokens_by_block.append(tokens.numpy())
        )
    torch_call(model, *args)
    net = functional(build(Config.from_dict(cfg)))
    params = to_params(model, cfg)
    out = jax.jit(partial(net.apply, method="features"))(params, *args)
    assert_text_kv_matches(net, params, args, jax.jit(net.apply)(params, *args), out)
    half = (len(tokens_by_block) + 1) // 2 - 1
    assert out.shape == tokens_by_block[half].shape and out.dtype == jnp.float32
    errors = [relative(out, tokens) for tokens in tokens_by_block]
    print(f"{name}: {errors[half]:.2e}")
    assert errors.pop(half) <= 1e-5
    assert all(error > 1e-3 for error in errors)


def test_a_prompt_without_tokens_is_that_of_diffusers():
    cfg, height, width = CASES["wide"]
    model = torch_model(cfg)
    x, t, text, mask, added = inputs(cfg, height, width)
    args = x, t, text, 0 * mask, added
    net = functional(build(Config.from_dict(cfg)))
    out = jax.jit(net.apply)(to_params(model, cfg), *args)
    # Near -10000 logits have steps of a thousandth, so rounding shows more than elsewhere.
    assert relative(out, torch_call(model, *args)) <= 3e-4


@pytest.mark.parametrize("name", ["native", "sized"])
def test_parameters_survive_the_round_trip(name):
    model = torch_model(CASES[name][0])
    back = dict(tensors_from_params(to_params(model, CASES[name][0]), KEYMAP))
    state = model.state_dict()
    assert set(back) == set(state)
    assert all(np.array_equal(back[k], v.numpy()) for k, v in state.items())


def test_derivatives_are_those_of_central_differences():
    cfg, height, width = CASES["wide"]
    params, args = to_params(torch_model(cfg), cfg), inputs(cfg, height, width, batch=2)
    with jax.enable_x64(True):
        params = cast(params, jnp.float64)
        net = functional(build(Config.from_dict(cfg), dtype=jnp.float64))
        x, *rest = (jnp.asarray(a, jnp.float64) for a in args[:4])
        r = np.random.default_rng(1)
        v, u, w = (jnp.asarray(r.standard_normal(x.shape)) for _ in range(3))

        def f(x):
            return net.apply(params, x, *rest)

        @jax.jit
        def both(x):
            return geometry.tangent(f, x, v)

        def g(x):  # a scalar that holds a forward derivative
            return jnp.sum(jnp.sin(both(x)[1]))

        def central(f, along, h=1e-4):
            far = f(x + 2 * h * along) - f(x - 2 * h * along)
            return (8 * (f(x + h * along) - f(x - h * along)) - far) / (12 * h)

        first = relative(both(x)[1], central(lambda x: both(x)[0], v))
        gradient = jax.jit(jax.grad(g))(x)
        second = [relative(jnp.vdot(gradient, a), central(g, a)) for a in (u, w)]
    print(f"jvp {first:.2e}, grad of jvp {second[0]:.2e} {second[1]:.2e}")
    assert max(first, *second) <= 1e-7


@pytest.mark.slow
def test_remat_changes_nothing():
    cfg, height, width = CASES["sized"]
    params, args = to_params(torch_model(cfg), cfg), inputs(cfg, height, width)

    def out_and_grad(remat):
        net = functional(build(Config.from_dict(cfg), remat=remat))

        def loss(params):
            out = net.apply(params, *args)
            return jnp.square(out).mean(), out

        grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
        return flatten(grads) | {"out": out}

    with_remat, without = out_and_grad(True), out_and_grad(False)
    assert relative(with_remat.pop("out"), np.asarray(without.pop("out"))) <= 1e-6
    # On one scale for all: the gradient of a key's bias is zero up to rounding.
    largest = max(np.abs(g).max() for g in without.values())
    for name in without:
        assert np.abs(with_remat[name] - without[name]).max() <= 1e-6 * largest, name


def test_bfloat16_is_close():
    cfg, height, width = CASES["sized"]
    model, args = torch_model(cfg), inputs(cfg, height, width)
    params, exact = to_params(model, cfg), torch_call(model, *args)
    net = functional(build(Config.from_dict(cfg), dtype=jnp.bfloat16))
    out = jax.jit(net.apply)(cast(params, jnp.bfloat16), *args)
    assert out.dtype == jax.eval_shape(net.apply, params, *args).dtype == jnp.bfloat16
    a, b = np.asarray(out, np.float32).ravel(), exact.ravel()
    assert np.isfinite(a).all()
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    print(f"cosine {cosine:.6f}")
    assert cosine > 0.999


@pytest.mark.parametrize("size, params, tensors", [(64, 610_856_096, 603), (128, 611_349_152, 611)])
def test_published_inventory(size, params, tensors):
    cfg = PUBLISHED | {"sample_size": size}
    abstract = functional(build(Config.from_dict(cfg))).abstract
    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            **{k: v for k, v in cfg.items() if k not in (*LEGACY_ONLY, "_class_name")}
        )
    found = {k: shape for k, (_, _, shape) in expected_shapes(abstract, KEYMAP).items()}
    assert found == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert len(found) == tensors
    assert sum(leaf.size for leaf in flatten(abstract).values()) == params


def test_each_parameter_has_one_rule_and_splits_over_128_devices():
    cfg = PUBLISHED | {"sample_size": 128}
    abstract = functional(build(Config.from_dict(cfg))).abstract
    used = set()
    for path, leaf in flatten(abstract).items():
        matching = [(p, spec) for p, spec in RULES if re.search(p, path)]
        assert len(matching) == 1, path
        pattern, spec = matching[0]
        used.add(pattern)
        if not path.endswith("/bias"):
            (axis,) = [i for i, name in enumerate(spec) if name == "fsdp"]
            assert len(spec) == leaf.ndim and leaf.shape[axis] % 128 == 0, path
    assert used == {p for p, _ in RULES}


def test_published_configs_are_read():
    assert PUBLISHED["_class_name"] in CLASS_NAMES
    small, large = (Config.from_dict(PUBLISHED | {"sample_size": n}) for n in (64, 128))
    assert (small.dim, small.position_scale, small.size_conditioned) == (1152, 1, False)
    assert (large.dim, large.position_scale, large.size_conditioned) == (1152, 2, True)
    assert not Config.from_dict(
        tiny(sample_size=128, use_additional_conditions=False)
    ).size_conditioned


@pytest.mark.parametrize(
    "key, value",
    [
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
def test_unsupported_option_is_named(key, value):
    with pytest.raises(InputError, match=f"^{key}: found"):
        Config.from_dict(PUBLISHED | {key: value})


def test_missing_norm_type_is_refused_under_the_old_class_name():
    cfg = {k: v for k, v in PUBLISHED.items() if k != "norm_type"}
    with pytest.raises(InputError, match="norm_type"):
        Config.from_dict(cfg)
    Config.from_dict(cfg | {"_class_name": "PixArtTransformer2DModel"})


def test_bad_inputs_are_refused():
    cfg, height, width = CASES["sized"]
    net = functional(build(Config.from_dict(cfg)))
    x, t, text, mask, added = inputs(cfg, height, width)
    swapped = added | {"aspect_ratio": added["resolution"]}
    for bad in (None, {}, {"resolution": added["resolution"]}, swapped):
        with pytest.raises(InputError, match="added_cond"):
            jax.eval_shape(net.apply, net.abstract, x, t, text, mask, bad)
    with pytest.raises(InputError, match="multiples of the patch size 2"):
        jax.eval_shape(net.apply, net.abstract, x[:, :-1], t, text, mask, added)


def test_fresh_parameters_are_usable():
    cfg, height, width = CASES["native"]
    net = functional(build(Config.from_dict(cfg)))
    params = jax.jit(net.init)(jax.random.key(0, impl="rbg"))  # compiles faster
    assert {k: v.shape for k, v in flatten(params).items()} == {
        k: v.shape for k, v in flatten(net.abstract).items()
    }
    out = jax.jit(net.apply)(params, *inputs(cfg, height, width))
    assert np.isfinite(out).all() and np.abs(out).max() > 0
    kernels = params["blocks"]["ff"]["linear_1"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])  # layers are drawn independently
