"""The U-Net against diffusers' class: values, derivatives, key names."""

import re
from functools import cache, partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from text_kv import assert_text_kv_matches

from gadjax.diffusion import geometry
from gadjax.errors import InputError
from gadjax.formats.state_dict import expected_shapes, params_from_tensors, tensors_from_params
from gadjax.models import unet
from gadjax.models.module import functional
from gadjax.models.params import cast, flatten, unflatten
from gadjax.types import Cond

torch.set_num_threads(1)

# Configurations of the published repositories, without the class's defaults.
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD2 = SD15 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
SDXL = SD2 | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "upcast_attention": None,
}
PUBLISHED = {
    "1.5": (SD15, 859_520_964, 686),
    "2, 2.1 base": (SD2, 865_910_724, 686),
    "2.1": (SD2 | {"sample_size": 96, "upcast_attention": True}, 865_910_724, 686),
    "XL": (SDXL, 2_567_463_684, 1680),
}

# As 1.5 (1x1 convolutions, one number of heads) and as XL; they differ in every size.
CONV = SD15 | {
    "attention_head_dim": 2,
    "block_out_channels": [8, 12, 16],
    "cross_attention_dim": 10,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "only_cross_attention": [False] * 3,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
}
LINEAR = SDXL | {
    "addition_time_embed_dim": 6,
    "attention_head_dim": [3, 5],
    "block_out_channels": [18, 30],
    "cross_attention_dim": 14,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 6,
    "norm_eps": 1e-3,
    "norm_num_groups": 3,
    "out_channels": 6,
    "projection_class_embeddings_input_dim": 11 + 6 * 6,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
TINY = LINEAR | {
    "attention_head_dim": [1, 2],
    "block_out_channels": [4, 6],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 3,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "out_channels": 3,
    "up_block_types": ["UpBlock2D"] * 2,
    "use_linear_projection": False,
}
CASES = {"conv": (CONV, 8, 12), "linear": (LINEAR, 10, 6)}


def torch_class(cfg):
    return diffusers.UNet2DConditionModel(**{k: v for k, v in cfg.items() if k[0] != "_"})


def torch_net(cfg):
    """diffusers' network with random parameters, none at its initial zero or one."""
    torch.manual_seed(0)
    net = torch_class(cfg).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def port(cfg, **options):
    return functional(unet.FAMILY.build(unet.FAMILY.config.from_dict(cfg), **options))


def to_params(net, abstract):
    tensors = {k: v.numpy() for k, v in net.state_dict().items()}
    return params_from_tensors(tensors, abstract, unet.FAMILY.keymap)


@cache
def loaded(name):
    """(torch's network, ours, its parameters) of a case."""
    net, ours = torch_net(CASES[name][0]), port(CASES[name][0])
    return net, ours, to_params(net, ours.abstract)


def inputs(cfg, height, width, batch=3, length=5):
    r = np.random.default_rng(0)
    x = r.standard_normal((batch, height, width, cfg["in_channels"]), np.float32)
    t = np.array([0.0, 499.25, 999.0], np.float32)[:batch]
    text = r.standard_normal((batch, length, cfg["cross_attention_dim"]), np.float32)
    if "addition_embed_type" not in cfg:
        return x, t, text, None
    pooled = r.standard_normal((batch, unet.FAMILY.config.from_dict(cfg).pooled_dim), np.float32)
    ids = np.array([[512, 768, 0, 8, 512, 640], [1024] * 6, [96, 64, 1, 2, 3, 4]], np.float32)
    return x, t, text, {"text_embeds": pooled, "time_ids": ids[:batch]}


def torch_call(net, x, t, text, added):
    with torch.no_grad():
        out = net(
            torch.tensor(x).permute(0, 3, 1, 2),
            torch.tensor(t),
            torch.tensor(text),
            added_cond_kwargs=added and {k: torch.tensor(v) for k, v in added.items()},
        )
    return out.sample.permute(0, 2, 3, 1).numpy()


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", CASES)
def test_output_and_features_are_those_of_diffusers(name):
    cfg, height, width = CASES[name]
    (net, ours, params), args = loaded(name), inputs(cfg, height, width)
    outputs = []
    hook = net.mid_block.register_forward_hook(
        lambda block, given, out: outputs.append(out.numpy())
    )
    expected = torch_call(net, *args)
    hook.remove()

    @jax.jit
    def both(params, *args):
        return ours.apply(params, *args), ours.apply(params, *args, method="features")

    out, half = both(params, *args)
    assert_text_kv_matches(ours, params, args, out, half)
    half_NCHW = outputs[0]
    expected_half = half_NCHW.reshape(*half_NCHW.shape[:2], -1).transpose(0, 2, 1)
    errors = relative(out, expected), relative(half, expected_half)
    print(f"{name}: output {errors[0]:.2e}, features {errors[1]:.2e}")
    assert out.dtype == half.dtype == jnp.float32
    assert max(errors) <= 1e-5
    # The test is sensitive: every other input changes the output.
    x, t, text, added = args
    others = [(x, t[::-1], text, added), (x, t, text[::-1], added)]
    if added:
        others += [(x, t, text, added | {k: v[::-1].copy()}) for k, v in added.items()]
    for other in others:
        assert relative(both(params, *other)[0], expected) > 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_parameters_survive_the_round_trip(dtype):
    for name in CASES:
        net, ours, _ = loaded(name)
        state = {k: v.numpy().astype(dtype) for k, v in net.state_dict().items()}
        params = params_from_tensors(state, ours.abstract, unet.FAMILY.keymap)
        back = dict(tensors_from_params(params, unet.FAMILY.keymap))
        assert set(back) == set(state)
        for key, value in state.items():
            assert back[key].dtype == value.dtype == dtype
            np.testing.assert_array_equal(back[key].view(np.uint8), value.view(np.uint8))


@cache
def published(name):
    return port(PUBLISHED[name][0]).abstract


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_inventory(name):
    cfg, count, tensors = PUBLISHED[name]
    if name == "2.1":  # read, and then the same network
        ours, base = (unet.FAMILY.config.from_dict(PUBLISHED[n][0]) for n in (name, "2, 2.1 base"))
        changed = {k for k, v in vars(ours).items() if v != getattr(base, k)}
        assert changed == {"sample_size"}
        return
    with torch.device("meta"):
        state = torch_class(cfg).state_dict()
    found = {k: v[2] for k, v in expected_shapes(published(name), unet.FAMILY.keymap).items()}
    assert found == {k: tuple(v.shape) for k, v in state.items()}
    assert len(found) == tensors
    assert sum(leaf.size for leaf in jax.tree.leaves(published(name))) == count


def test_rules_name_every_large_parameter_and_divide_it():
    mesh, used = {"fsdp": 32, "tensor": 2}, set()
    for name in ("1.5", "2, 2.1 base", "XL"):
        for path, leaf in flatten(published(name)).items():
            matching = [(p, spec) for p, spec in unet.FAMILY.rules if re.search(p, path)]
            assert len(matching) <= 1, path
            if not matching:
                assert leaf.size < 2**16, path
                continue
            pattern, spec = matching[0]
            used.add(pattern)
            assert len(spec) == leaf.ndim and "fsdp" in spec, path
            for size, axis in zip(leaf.shape, spec, strict=True):
                assert axis is None or size % mesh[axis] == 0, path
    assert used == {p for p, _ in unet.FAMILY.rules}


def test_derivatives_match_central_differences():
    """Derivatives in the first and a middle parameter: the first's goes through all others."""
    net = torch_net(TINY)
    ours = port(TINY, dtype=jnp.float64)
    x, t, text, added = inputs(TINY, 2, 4, batch=1)
    t = t + 320.5
    # All arithmetic outside `run` is numpy's: jax would compile it shape by shape.
    flat = {k: p.astype(np.float64) for k, p in flatten(to_params(net, ours.abstract)).items()}
    middle = "mid_block/attentions/0/transformer_blocks/attn1/to_q/kernel"
    point = {k: flat.pop(k) for k in ("conv_in/kernel", middle)}
    r = np.random.default_rng(1)
    x, v = x.astype(np.float64), r.standard_normal(x.shape)
    along = {k: r.standard_normal(p.shape) for k, p in point.items()}
    with jax.enable_x64(True):

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def run(point, x):
            def f(x):
                return ours.apply(unflatten(flat | point), x, t, text, added)

            value, tangent = geometry.tangent(f, x, v)
            return jnp.sum(jnp.sin(tangent)), (value, tangent)

        def central(at, h=1e-4):
            return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)

        (_, (value, tangent)), gradient = jax.device_get(run(point, x))
        assert value.dtype == np.float64
        slope_x = central(lambda h: np.asarray(run(point, x + h * v)[0][1][0]))
        errors = [relative(tangent, slope_x)]
        for key, step in along.items():
            slope = central(
                lambda h, k=key, d=step: float(run(point | {k: point[k] + h * d}, x)[0][0])
            )
            assert abs(slope) > 1e-4
            errors.append(relative(np.vdot(gradient[key], step), slope))
    print("jvp {:.2e}, grad of jvp: first {:.2e}, middle {:.2e}".format(*errors))
    assert max(errors) < 1e-6


def remats(jaxpr):
    """Numbers of (checkpointed parts, those of them inside a loop)."""
    outer = inner = 0
    for eqn in jaxpr.eqns:
        outer += eqn.primitive.name.startswith("remat")
        if eqn.primitive.name == "scan":
            inner += sum(remats(eqn.params["jaxpr"].jaxpr))
    return outer, inner


@pytest.mark.parametrize("remat, counts", [(True, (2 + 2 + 4, 1 + 1)), (False, (0, 0))])
def test_remat_recomputes_residual_and_transformer_blocks(remat, counts):
    ours = port(TINY, remat=remat)
    jaxpr = jax.make_jaxpr(ours.apply)(ours.abstract, *inputs(TINY, 2, 4)).jaxpr
    assert remats(jaxpr) == counts


def test_bfloat16_is_close():
    net, args, ours = torch_net(TINY), inputs(TINY, 4, 6), port(TINY, dtype=jnp.bfloat16)
    params = to_params(net, ours.abstract)
    out = jax.jit(ours.apply)(cast(params, jnp.bfloat16), *args)
    assert out.dtype == jax.eval_shape(ours.apply, params, *args).dtype == jnp.bfloat16
    a, b = np.asarray(out, np.float32).ravel(), torch_call(net, *args).ravel()
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    print(f"cosine {cosine:.6f}")
    assert cosine > 0.999


def test_extras_are_the_pipelines_micro_conditioning_of_sdxl():
    plain, sdxl = (unet.FAMILY.config.from_dict(c) for c in (SD15, SDXL))
    assert (plain.pooled_dim, sdxl.pooled_dim) == (None, 1280)
    assert unet.FAMILY.extras(plain, 2, 512, 768) is None
    pooled = np.ones((2, 1280), np.float32)
    extras = unet.FAMILY.extras(sdxl, 2, 512, 768, pooled)
    assert extras["text_embeds"] is pooled
    np.testing.assert_array_equal(extras["time_ids"], [[512, 768, 0, 0, 512, 768]] * 2)
    with pytest.raises(InputError, match="^pooled: found nothing; expected"):
        unet.FAMILY.extras(sdxl, 2, 512, 768)


def test_a_predictor_passes_text_and_extras_and_no_mask():
    x, t, text, added = inputs(*CASES["linear"])
    cond = Cond(text, "mask", added)

    def apply(*args, **kwargs):
        return args, kwargs

    call = unet.FAMILY.predictor(apply, unet.FAMILY.config.from_dict(LINEAR))
    assert call("params", x, t, cond) == (("params", x, t, text, added), {})
    expected = ("params", x, t, text, added), {"method": "features"}
    assert unet.FAMILY.features(apply)("params", x, t, cond) == expected


def test_published_configs_are_read():
    assert unet.FAMILY.class_names == (SD15["_class_name"],)
    small, large = (unet.FAMILY.config.from_dict(c) for c in (SD15, SDXL))
    assert small.attention_head_dim == (8,) * 4 and small.transformer_layers_per_block == (1,) * 4
    assert (small.sample_size, small.in_channels, small.multiple) == (64, 4, 8)
    assert large.transformer_layers_per_block == (1, 2, 10)
    assert (large.sample_size, large.multiple) == (128, 4)
    hash(large)


@pytest.mark.parametrize(
    "key, value",
    [
        ("act_fn", "gelu"),
        ("addition_embed_type", "text"),
        ("addition_time_embed_dim", None),
        ("addition_time_embed_dim", 5),
        ("attention_head_dim", 7),
        ("attention_head_dim", [5, 10]),
        ("block_out_channels", None),
        ("block_out_channels", [320, 640.0, 1280]),
        ("center_input_sample", True),
        ("class_embed_type", "timestep"),
        ("cross_attention_dim", [2048] * 3),
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"]),
        ("downsample_padding", 0),
        ("dual_cross_attention", True),
        ("flip_sin_to_cos", False),
        ("freq_shift", 1),
        ("layers_per_block", [2, 2, 2]),
        ("mid_block_type", None),
        ("norm_num_groups", 30),
        ("norm_num_groups", None),
        ("only_cross_attention", [False, True, False]),
        ("out_channels", 8),
        ("projection_class_embeddings_input_dim", 1536),
        ("quantization_config", {"load_in_4bit": True}),
        ("resnet_time_scale_shift", "scale_shift"),
        ("sample_size", None),
        ("time_cond_proj_dim", 256),
        ("transformer_layers_per_block", [1, [1, 2], 10]),
        ("up_block_types", ["CrossAttnUpBlock2D"] * 2),
    ],
)
def test_unsupported_option_is_named(key, value):
    with pytest.raises(InputError, match=f"^{key}: found .*; expected ") as found:
        unet.FAMILY.config.from_dict(SDXL | {key: value})
    assert "\n" not in str(found.value)


def test_bad_inputs_are_refused():
    _, ours, _ = loaded("linear")
    x, t, text, added = inputs(*CASES["linear"])
    ids = added["time_ids"]
    for bad in (None, {}, {"time_ids": ids}, added | {"text_embeds": ids}):
        with pytest.raises(InputError, match=r"^added_cond\['text_embeds'\]: found"):
            jax.eval_shape(ours.apply, ours.abstract, x, t, text, bad)
    with pytest.raises(InputError, match=r"^added_cond\['time_ids'\]: found shape \(3, 5\)"):
        jax.eval_shape(ours.apply, ours.abstract, x, t, text, added | {"time_ids": ids[:, :5]})
    for method in ("__call__", "features"):
        with pytest.raises(InputError, match="^latents: found 9 x 6; expected multiples of 2"):
            args = ours.abstract, x[:, :-1], t, text, added
            jax.eval_shape(partial(ours.apply, method=method), *args)


@pytest.mark.slow
def test_fresh_parameters_are_usable():
    cfg = CONV | {  # one block, as drawing compiles slowly
        "attention_head_dim": 1,
        "block_out_channels": [4],
        "down_block_types": ["DownBlock2D"],
        "norm_num_groups": 2,
        "only_cross_attention": False,
        "transformer_layers_per_block": 2,
        "up_block_types": ["UpBlock2D"],
    }
    ours, args = port(cfg), inputs(cfg, 3, 5)

    @jax.jit
    def start(key):
        params = ours.init(key)
        return params, ours.apply(params, *args)

    params, out = start(jax.random.key(0, impl="rbg"))  # compiles faster
    shapes, found = (
        {k: (v.shape, v.dtype) for k, v in flatten(p).items()} for p in (ours.abstract, params)
    )
    assert found == shapes and {dtype for _, dtype in found.values()} == {np.dtype(np.float32)}
    assert np.isfinite(out).all() and np.abs(out).max() > 0
    # Layers and parts are drawn independently.
    blocks = flatten(params["mid_block"]["attentions"]["0"]["transformer_blocks"])
    q, k = blocks["attn1/to_q/kernel"], blocks["attn1/to_k/kernel"]
    assert not np.allclose(q[0], q[1]) and not np.allclose(q, k)
