"""AutoencoderDC against diffusers' class: values, derivatives, key names, shardings."""

from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance import NetworkCase, NetworkSuite, Published, Rules, torch_class

from gadjax.errors import InputError
from gadjax.formats.state_dict import params_from_tensors, tensors_from_params
from gadjax.models.module import functional
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
    each = {
        "block_out_channels": widths,
        "block_types": types,
        "qkv_multiscales": [kernel or [] for kernel in kernels],
    }
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in each.items()}
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
CASES = {"three stages": SMALL, "two scales": OTHER}


def torch_net(cfg):
    """diffusers' network with random parameters, none at its initial zero or one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = CASE.torch_network(cfg).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def ours(cfg, net, stored=np.float32, **options):
    """(apply, params) with the weights of `net`."""
    made = functional(dc.build(dc.Config.from_dict(cfg), **options))
    tensors = {k: v.numpy().astype(stored) for k, v in net.state_dict().items()}
    return made.apply, params_from_tensors(tensors, made.abstract, dc.KEYMAP)


def nchw(x):
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative(found, reference):
    assert found.shape == reference.shape
    return np.abs(np.asarray(found, np.float64) - reference).max() / np.abs(reference).max()


# 2 x 1 latents: diffusers leaves linear attention where there are few positions.
@pytest.mark.parametrize("name, h, w", [(n, *s) for n in CASES for s in ((6, 4), (2, 1))])
def test_encode_and_decode_match_diffusers(name, h, w):
    cfg = CASES[name]
    net, config = torch_net(cfg), dc.Config.from_dict(cfg)
    apply, params = ours(cfg, net)
    image = normal(1, 2, config.upscale * h, config.upscale * w, 3)
    latent = normal(2, 2, h, w, config.latent_channels)
    with torch.no_grad():
        expected = nhwc(net.encode(nchw(image)).latent), nhwc(net.decode(nchw(latent)).sample)

    @jax.jit
    def run(params, image, latent):
        found, logvar = apply(params, image, method="encode")
        assert logvar is None
        return found, apply(params, latent, method="decode")

    found = run(params, image, latent)
    assert found[0].shape == latent.shape and found[1].shape == image.shape
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    print(f"{name} {h} x {w}: encode {errors[0]:.2e}, decode {errors[1]:.2e}")
    assert max(errors) <= 1e-5


def test_pixel_shuffles_are_those_of_torch():
    x = normal(0, 2, 4, 6, 3)
    small = dc_blocks.pixel_unshuffle(x)
    assert np.array_equal(small, nhwc(F.pixel_unshuffle(nchw(x), 2)))
    assert np.array_equal(dc_blocks.pixel_shuffle(small), x)
    # Neighbouring channels share a mean, and are copies of one.
    assert np.array_equal(dc_blocks.average_channels(np.arange(6.0), 3), [0.5, 2.5, 4.5])
    assert np.array_equal(dc_blocks.repeat_channels(np.arange(2.0), 4), [0, 0, 1, 1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_parameters_survive_the_round_trip(dtype):
    net = torch_net(OTHER)
    back = dict(tensors_from_params(ours(OTHER, net, dtype)[1], dc.KEYMAP))
    state = net.state_dict()
    assert set(back) == set(state)
    for key, value in state.items():
        assert back[key].dtype == dtype and np.array_equal(back[key], value.numpy().astype(dtype))


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_derivatives_match_central_differences(method):
    apply, params = ours(TINY, torch_net(TINY), stored=np.float64, dtype=jnp.float64)
    x, u, v = (
        normal(i, *((1, 6, 4, 3) if method == "encode" else (1, 3, 2, 4))).astype(np.float64)
        for i in range(3)
    )
    along = jax.tree.map(lambda p: 0.1 * np.cos(p), params)
    with jax.enable_x64(True):

        def g(params, x):
            def net(x):
                out = apply(params, x, method=method)
                return out[0] if method == "encode" else out

            value, tangent = jax.jvp(net, (x,), (v,))
            return jnp.sum(tangent**2), (value, tangent)

        run = jax.jit(jax.value_and_grad(g, (0, 1), has_aux=True))
        (_, (_, tangent)), (slopes, slope_x) = jax.device_get(run(params, x))

        def difference(along_params, along_x, h=1e-6):  # short, because every relu is a kink
            def at(s):
                there = jax.tree.map(lambda p, d: p + s * d, params, along_params)
                return run(there, x + s * along_x)[0]

            ahead, behind = at(h), at(-h)
            return jax.tree.map(lambda a, b: (np.asarray(a) - b) / (2 * h), ahead, behind)

        still = jax.tree.map(np.zeros_like, params)
        slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, slopes, along))) + np.vdot(slope_x, u)
        errors = (
            relative(tangent, difference(still, v)[1][0]),
            relative(slope, difference(along, u)[0]),
        )
    print(f"{method}: jvp {errors[0]:.2e}, grad of jvp {errors[1]:.2e}")
    assert max(errors) < 1e-6


@pytest.mark.parametrize("remat, blocks", [(True, 3), (False, 0)])
def test_remat_recomputes_every_block(remat, blocks):
    made = functional(dc.build(dc.Config.from_dict(TINY), remat=remat))
    latent = jax.ShapeDtypeStruct((1, 3, 2, 4), jnp.float32)
    jaxpr = jax.make_jaxpr(partial(made.apply, method="decode"))(made.abstract, latent)
    assert sum(eqn.primitive.name.startswith("remat") for eqn in jaxpr.eqns) == blocks


def test_bfloat16_stays_near_float32():
    net, latent = torch_net(TINY), normal(1, 1, 3, 2, 4)
    apply, params = ours(TINY, net, stored=jnp.bfloat16, dtype=jnp.bfloat16)
    with torch.no_grad():
        reference = nhwc(net.decode(nchw(latent)).sample)
    found = jax.jit(partial(apply, method="decode"))(params, latent)
    assert found.dtype == jnp.bfloat16
    assert relative(np.asarray(found, np.float32), reference) < 0.05


CASE = NetworkCase(
    family=dc.FAMILY,
    torch_network=torch_class(diffusers.AutoencoderDC),
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


class TestAutoencoderDC(NetworkSuite):
    case = CASE


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
    made = functional(dc.build(dc.Config.from_dict(SMALL)))
    with pytest.raises(InputError, match="image: found 8 x 6; expected multiples of 4"):
        jax.eval_shape(partial(made.apply, method="encode"), made.abstract, jnp.zeros((1, 8, 6, 3)))


@pytest.mark.slow
def test_fresh_parameters_are_usable():
    made = functional(dc.build(dc.Config.from_dict(TINY)))

    @jax.jit
    def run(key, image):
        params = made.init(key)
        latent, _ = made.apply(params, image, method="encode")
        return latent, made.apply(params, latent, method="decode")

    for out in run(jax.random.key(0, impl="rbg"), normal(1, 1, 6, 4, 3)):
        assert np.isfinite(out).all() and np.abs(out).max() > 0
