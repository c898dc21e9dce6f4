"""AutoencoderKL against diffusers' class: values, derivatives, key names."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gadjax.errors import InputError
from gadjax.formats.state_dict import expected_shapes, params_from_tensors, tensors_from_params
from gadjax.models.module import functional
from gadjax.models.params import flatten
from gadjax.models.vae import autoencoder_kl as kl

# Two sizes that differ in everything; the second as SD3 and FLUX have it.
SMALL = dict(
    block_out_channels=[8, 12, 16],
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
)
SMALL_16 = dict(
    block_out_channels=[12, 18],
    layers_per_block=2,
    latent_channels=16,
    norm_num_groups=6,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
TINY = dict(block_out_channels=[4, 6], layers_per_block=1, latent_channels=4, norm_num_groups=2)
FULL = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, norm_num_groups=32)


def block_types(config):
    count = len(config["block_out_channels"])
    return dict(
        down_block_types=["DownEncoderBlock2D"] * count, up_block_types=["UpDecoderBlock2D"] * count
    )


def torch_net(config, seed=0):
    """diffusers' network with random parameters, none at its initial zero or one."""
    torch.manual_seed(seed)
    net = diffusers.AutoencoderKL(**config, **block_types(config)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def ours(config, net, **options):
    """(apply, params) with the weights of `net`."""
    made = functional(kl.build(kl.Config.from_dict({**config, **block_types(config)}), **options))
    tensors = {k: v.numpy() for k, v in net.state_dict().items()}
    return made.apply, params_from_tensors(tensors, made.abstract, kl.KEYMAP)


def nchw(x):
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def assert_near(out, reference, tolerance=1e-5):
    assert out.shape == reference.shape
    assert np.abs(out - reference).max() <= tolerance * np.abs(reference).max()


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("config", [SMALL, SMALL_16], ids=["4", "16"])
def test_encode_and_decode_match_diffusers(config):
    net = torch_net(config)
    apply, params = ours(config, net)
    image, factor = normal(1, (2, 24, 16, 3)), 2 ** (len(config["block_out_channels"]) - 1)
    latent = normal(2, (2, 24 // factor, 16 // factor, config["latent_channels"]))
    with torch.no_grad():
        posterior = net.encode(nchw(image)).latent_dist
        decoded = net.decode(nchw(latent)).sample
    mean, logvar = jax.jit(lambda p, x: apply(p, x, method="encode"))(params, image)
    assert_near(mean, nhwc(posterior.mean))
    assert_near(logvar, nhwc(posterior.logvar))
    assert_near(jax.jit(lambda p, x: apply(p, x, method="decode"))(params, latent), nhwc(decoded))


def test_the_log_variance_is_clamped():
    net = torch_net(TINY)
    with torch.no_grad():
        net.quant_conv.bias[4:6], net.quant_conv.bias[6:] = -1000, 1000
    apply, params = ours(TINY, net)
    image = normal(1, (1, 6, 4, 3))
    logvar = jax.jit(lambda p: apply(p, image, method="encode")[1])(params)
    assert (logvar[..., :2] == -30).all() and (logvar[..., 2:] == 20).all()


def test_scale_is_that_of_diffusers_pipelines():
    config = kl.Config.from_dict({**SMALL_16, **block_types(SMALL_16)})
    latent = normal(0, (1, 2, 3, 16))
    np.testing.assert_allclose(kl.scale(latent, config), (latent - 0.0609) * 1.5305, rtol=1e-6)
    np.testing.assert_allclose(kl.unscale(kl.scale(latent, config), config), latent, atol=1e-6)


def test_old_names_of_the_attention_load_to_the_same():
    apply, params = ours(SMALL, net := torch_net(SMALL))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, value in net.state_dict().items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        tensors[key] = value.numpy()
    assert sum("proj_attn" in key for key in tensors) == 4
    abstract = functional(kl.build(kl.Config.from_dict({**SMALL, **block_types(SMALL)}))).abstract
    loaded = params_from_tensors(tensors, abstract, kl.KEYMAP)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))


def test_written_tensors_are_those_read():
    net = torch_net(SMALL)
    written = dict(tensors_from_params(ours(SMALL, net)[1], kl.KEYMAP))
    assert set(written) == set(net.state_dict())
    for key, value in net.state_dict().items():
        np.testing.assert_array_equal(written[key], value.numpy())


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_derivatives_match_central_differences(method):
    apply, params = ours(TINY, torch_net(TINY), dtype=jnp.float64, remat=True)
    shape = (1, 6, 4, 3) if method == "encode" else (1, 3, 2, 4)
    # All arithmetic outside `run` is numpy's: jax would compile it shape by shape.
    params = jax.tree.map(lambda p: p.astype(np.float64), params)
    x, u, v = (normal(i, shape).astype(np.float64) for i in range(3))
    point, along = (params, x), (jax.tree.map(lambda p: 0.1 * np.cos(p), params), u)
    with jax.enable_x64():

        def energy(point):
            def net(x):
                out = apply(point[0], x, method=method)
                return jnp.concatenate(out, -1) if method == "encode" else out

            value, tangent = jax.jvp(net, (point[1],), (v,))
            return jnp.sum(tangent**2), (value, tangent)

        def shifted(h, params_along, x_along):
            step = (jax.tree.map(lambda d: h * d, params_along), h * x_along)
            return jax.device_get(run(jax.tree.map(np.add, point, step))[0])

        run = jax.jit(jax.value_and_grad(energy, has_aux=True))
        (_, (_, tangent)), gradient = jax.device_get(run(point))
        h, still = 1e-5, jax.tree.map(np.zeros_like, params)
        plus, minus = (shifted(s, still, v)[1][0] for s in (h, -h))
        assert_near(tangent, (plus - minus) / (2 * h), 1e-7)
        slope = (shifted(h, *along)[0] - shifted(-h, *along)[0]) / (2 * h)
        assert_near(sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, along))), slope, 1e-7)


@pytest.mark.parametrize("remat, blocks", [(True, 4 + 1 + 2), (False, 0)])
def test_remat_recomputes_every_residual_block_and_the_attention(remat, blocks):
    made = functional(kl.build(kl.Config.from_dict({**TINY, **block_types(TINY)}), remat=remat))
    latent = jax.ShapeDtypeStruct((1, 3, 2, 4), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda p, x: made.apply(p, x, method="decode"))(made.abstract, latent)
    assert sum(eqn.primitive.name.startswith("remat") for eqn in jaxpr.eqns) == blocks


def test_bfloat16_stays_near_float32():
    net, image = torch_net(TINY), normal(1, (1, 6, 4, 3))
    apply, params = ours(TINY, net, dtype=jnp.bfloat16)
    with torch.no_grad():
        reference = nhwc(net.encode(nchw(image)).latent_dist.mean)
    mean = jax.jit(lambda p: apply(p, image, method="encode")[0])
    found = mean(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    assert found.dtype == jnp.bfloat16
    assert_near(np.asarray(found, np.float32), reference, 0.05)


@pytest.mark.parametrize(
    "extra, count",
    [
        (dict(latent_channels=4), 83_653_863),
        (dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False), 83_819_683),
    ],
    ids=["SD", "SD3"],
)
def test_full_size_names_and_shapes(extra, count):
    config = {**FULL, **extra, **block_types(FULL)}
    with torch.device("meta"):
        reference = diffusers.AutoencoderKL(**config).state_dict()
    abstract = functional(kl.build(kl.Config.from_dict(config))).abstract
    shapes = {k: v[2] for k, v in expected_shapes(abstract, kl.KEYMAP).items()}
    assert shapes == {k: tuple(v.shape) for k, v in reference.items()}
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == count
    assert all(isinstance(name, str) for name in flatten(abstract))


@pytest.mark.parametrize(
    "change",
    [
        dict(act_fn="relu"),
        dict(up_block_types=["AttnUpDecoderBlock2D"] * 3),
        dict(down_block_types=["DownEncoderBlock2D"]),
        dict(latents_mean=[0.0] * 4),
        dict(norm_num_groups=3),
        dict(dropout=0.1),
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_unsupported_option_is_refused_by_name(change):
    config = {**SMALL, **block_types(SMALL), "_class_name": "AutoencoderKL", "sample_size": 32}
    kl.Config.from_dict(config)
    with pytest.raises(InputError, match=f"^{next(iter(change))}: found .*; expected"):
        kl.Config.from_dict({**config, **change})
