"""Kernels of any kind in one product: dense as without it, adapted as merged."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from several import run_on_devices

from gadjax.models import layers
from gadjax.models.module import functional
from gadjax.ops import linear as ops
from gadjax.ops.linear import Adapter, LowRank, Quantized, dense, quantize
from gadjax.parallel.placement import Placement, constrain_batch, current_placement
from gadjax.parallel.sharding import batch_sharding, make_mesh

RNG = np.random.default_rng(0)


def low_rank(shape, rank=3, scale=0.7):
    """A random adapted kernel [..., in, out] or [..., H, W, in, out], in float64."""
    *before, inputs, outputs = shape
    layers, sides = before[: len(before) % 2], before[len(before) % 2 :]
    a = RNG.normal(size=(*before, inputs, rank))
    b = RNG.normal(size=(*layers, *(1 for _ in sides), rank, outputs))
    return LowRank(RNG.normal(size=shape), Adapter(a, b, scale))


def make(kind, sizes, options, keys):
    return kind(*sizes, rngs=keys, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_dense_layer_is_traced_as_flax_traces_it(dtype, bias):
    """To the same program, operation for operation."""
    linear, conv = {"use_bias": bias, "dtype": dtype}, {"strides": 2, "feature_group_count": 2}
    pairs = [
        ((layers.Linear, nnx.Linear), (4, 6), linear, (2, 3, 4)),
        ((layers.Conv, nnx.Conv), (4, 6, (3, 3)), linear | conv, (2, 5, 5, 4)),
    ]
    for kinds, sizes, options, shape in pairs:
        nets = [functional(partial(make, kind, sizes, options)) for kind in kinds]
        x = jnp.zeros(shape)
        assert len({str(jax.make_jaxpr(net.apply)(net.abstract, x)) for net in nets}) == 1


@pytest.mark.parametrize("scale", [1, 0.7])
def test_an_adapted_layer_is_the_merged_one(scale):
    cases = [
        (lambda k: layers.Linear(5, 7, rngs=k), (5, 7), (2, 3, 5)),
        (
            lambda k: layers.Conv(5, 7, (3, 3), strides=2, padding=((1, 1), (1, 1)), rngs=k),
            (3, 3, 5, 7),
            (2, 6, 4, 5),
        ),
        (
            lambda k: layers.PatchProjection(5, 8, 2, dtype=jnp.float64, rngs=k),
            (2, 2, 5, 8),
            (2, 6, 4, 5),
        ),
    ]
    with jax.enable_x64(True):
        for make, shape, inputs in cases:
            net, kernel, x = functional(make), low_rank(shape, scale=scale), RNG.normal(size=inputs)
            bias = RNG.normal(size=shape[-1])
            whole = kernel.base + scale * (kernel.adapter.a @ kernel.adapter.b)
            found, expected, alone = (
                net.apply({"kernel": jax.tree.map(jnp.asarray, k), "bias": bias}, x)
                for k in (kernel, whole, kernel.base)
            )
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(found).max())
            assert np.abs(found - alone).max() > 0.1 * np.abs(found).max()


def test_two_adapters_of_one_kernel():
    one = low_rank((5, 7))
    two = LowRank(one, low_rank((5, 7)).adapter)
    x = np.float32(RNG.normal(size=(3, 5)))
    found = ops.linear(x, jax.tree.map(jnp.float32, two))
    np.testing.assert_allclose(found, x @ dense(two), rtol=0, atol=1e-4)


def test_no_update_of_b_is_the_base_to_the_bit():
    kernel = jax.tree.map(np.float32, low_rank((16, 24)))
    zero = LowRank(kernel.base, Adapter(kernel.adapter.a, 0 * kernel.adapter.b, 0.7))
    x = np.float32(RNG.normal(size=(5, 16)))
    run = jax.jit(ops.linear)
    np.testing.assert_array_equal(run(x, zero), run(x, kernel.base))


@pytest.mark.parametrize("axis,outputs", [(0, 7), (1, 3)])
def test_chunks_are_parts_of_the_kernel(axis, outputs):
    kernel = low_rank((6, 7) if axis == 0 else (5, 9))

    def split(x, axis):
        return jnp.stack(jnp.split(x, 3, axis))

    parts = ops.chunks(kernel, axis, split)
    wholes = np.split(dense(kernel), 3, axis)
    for i, whole in enumerate(wholes):
        part = jax.tree.map(lambda x, i=i: np.asarray(x[i]), parts)
        assert part.base.shape[1] == outputs
        np.testing.assert_allclose(dense(part), whole, rtol=1e-5, atol=1e-5)


def test_stacked_kernels_are_merged_by_layer():
    for shape in ((4, 5, 7), (4, 3, 3, 5, 7)):
        kernel = low_rank(shape)
        whole = dense(kernel)
        for i in range(4):
            layer = jax.tree.map(lambda x, i=i: x[i], kernel)
            np.testing.assert_allclose(dense(layer), whole[i], rtol=1e-6, atol=1e-6)
        assert whole.dtype == np.float32


def test_a_kernel_is_read_whole():
    with pytest.raises(TypeError, match="found the index 0"):
        low_rank((5, 7))[0]


LAYERS = [
    (lambda k: layers.Linear(5, 7, rngs=k), (5, 7), (2, 3, 5)),
    (
        lambda k: layers.Conv(5, 7, (3, 3), strides=2, padding=((1, 1), (1, 1)), rngs=k),
        (3, 3, 5, 7),
        (2, 6, 4, 5),
    ),
    (
        lambda k: layers.PatchProjection(5, 8, 2, dtype=jnp.float64, rngs=k),
        (2, 2, 5, 8),
        (2, 6, 4, 5),
    ),
]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_an_8_bit_layer_is_the_dequantised_one(number, adapted):
    """Value, tangent and gradient through the activations, and those of adapters on it."""
    make, shape, inputs = LAYERS[number]
    net, kernel = functional(make), quantize(RNG.normal(size=shape))
    array = kernel.values * kernel.scales.astype(np.float64)
    adapter, bias = low_rank(shape).adapter, RNG.normal(size=shape[-1])
    x, u = (RNG.normal(size=inputs) for _ in range(2))

    def run(kernel, x, adapter):
        kernel = LowRank(kernel, adapter) if adapted else kernel
        return net.apply({"kernel": kernel, "bias": bias}, x)

    def everything(kernel):
        kernel, given = jax.tree.map(jnp.asarray, (kernel, adapter))
        y, tangent = jax.jvp(lambda x: run(kernel, x, given), (x,), (u,))
        loss = lambda x, a: jnp.sum(jnp.sin(run(kernel, x, a)))  # noqa: E731
        return y, tangent, jax.grad(loss, (0, 1))(x, given)

    with jax.enable_x64(True):
        found, expected = (jax.tree.leaves(everything(k)) for k in (kernel, array))
        for one, other in zip(found, expected, strict=True):
            limit = 1e-13 * max(1, np.abs(other).max())
            np.testing.assert_allclose(one, other, rtol=0, atol=limit)
    assert dense(kernel).dtype == np.float32
    np.testing.assert_allclose(dense(kernel), array, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(5, 7), (3, 3, 5, 7), (4, 5, 7), (4, 3, 3, 5, 7)])
def test_8_bits_are_the_nearest_of_255_values(shape):
    kernel = RNG.normal(size=shape).astype(np.float32)
    kernel[..., 2] = 0
    layers = shape[: len(shape) % 2]
    found = quantize(kernel)
    assert found.values.dtype == np.int8 and found.values.shape == found.shape == shape
    assert found.scales.dtype == np.float32 and found.scales.shape == (*layers, 7)
    axes = tuple(range(len(layers), len(shape) - 1))
    np.testing.assert_allclose(
        found.scales * 127, np.where(np.arange(7) == 2, 127, np.abs(kernel).max(axes)), rtol=1e-6
    )
    assert np.abs(found.values).max() == 127
    step = np.expand_dims(found.scales, axes)
    assert np.abs(dense(found) - kernel).max() <= 0.5001 * step.max()
    assert (np.abs(dense(found) - kernel) <= 0.5001 * step).all()
    shapes = quantize(jax.ShapeDtypeStruct(shape, jnp.float32))
    for one, other in zip(jax.tree.leaves(shapes), jax.tree.leaves(found), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize("axis", [0, 1])
def test_chunks_of_an_8_bit_kernel(axis):
    kernel = quantize(RNG.normal(size=(6, 9)))
    parts = ops.chunks(kernel, axis, lambda x, axis: jnp.stack(jnp.split(x, 3, axis)))
    for i, whole in enumerate(np.split(dense(kernel), 3, axis)):
        part = jax.tree.map(lambda x, i=i: np.asarray(x[i]), parts)
        np.testing.assert_array_equal(dense(part), whole)


def test_an_8_bit_product_is_in_the_layers_dtype():
    kernel = quantize(RNG.normal(size=(64, 8)))
    net = functional(partial(make, layers.Linear, (64, 8), {"dtype": jnp.bfloat16}))
    x = RNG.normal(size=(3, 64)).astype(np.float32)
    found = net.apply({"kernel": jax.tree.map(jnp.asarray, kernel), "bias": jnp.zeros(8)}, x)
    assert found.dtype == jnp.bfloat16
    # One rounding of x, one of the product, one after the scale.
    np.testing.assert_allclose(np.float32(found), x @ dense(kernel), atol=0.12)
    assert isinstance(kernel[...], Quantized) and kernel.astype(jnp.bfloat16) is kernel


def test_reverse_mode_keeps_8_bits():
    """No converted copy of the kernels of a scanned stack is stored for it."""
    kernels = jax.tree.map(jnp.asarray, quantize(RNG.normal(size=(4, 16, 16))))

    def run(x):
        return jax.lax.scan(lambda x, k: (jnp.tanh(ops.linear(x, k)), None), x, kernels)[0]

    _, pull = jax.vjp(run, jnp.ones((3, 16)))
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= kernels.values.size]
    assert kept and all(leaf.dtype == jnp.int8 for leaf in kept)


def depthwise(mesh=None):
    """Loss and gradients of a depthwise convolution, and its program; the kernel is split over the
    mesh's devices."""
    rng = np.random.default_rng(1)
    given = [np.float32(rng.normal(size=size)) for size in ((3, 3, 1, 64), (16, 8, 8, 64))]

    def loss(kernel, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        same = {"padding": "SAME", "dimension_numbers": numbers, "feature_group_count": 64}
        return jnp.mean(ops.conv_general_dilated(x, kernel, (1, 1), **same) ** 2)

    def run(kernel, x):
        with current_placement(mesh and Placement(mesh)):
            return jax.value_and_grad(loss, (0, 1))(kernel, x)

    places = {}
    if mesh:
        split = NamedSharding(mesh, PartitionSpec(None, None, None, "fsdp"))
        places["in_shardings"] = split, batch_sharding(mesh)
        places["out_shardings"] = NamedSharding(mesh, PartitionSpec()), places["in_shardings"]
    program = jax.jit(run, **places).lower(*given).compile()
    return jax.device_get(program(*given)), program.as_text()


def worker():
    (one, _), (eight, text) = depthwise(), depthwise(make_mesh({"data": 1, "fsdp": 8}))
    assert "all-gather(" in text and "all-to-all" not in text and "permute(" not in text
    for a, b in zip(*map(jax.tree.leaves, (one, eight)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_depthwise_convolution_gathers_its_kernel_and_no_activations():
    run_on_devices(8, __file__)


def test_an_adapted_product_exchanges_no_activations():
    """Of blocks in reverse mode, compiled for TPUs: where b is split along the outputs, they were
    computed split and then exchanged."""
    pytest.importorskip("libtpu")
    from gadjax.parallel.hardware import find_topology

    mesh = make_mesh({"data": 1, "fsdp": 4}, find_topology("v5e:2x2").devices())
    layers, tokens, width, wide, rank = 2, 1024, 768, 6912, 64

    def shape(*sizes, split=None):
        spec = PartitionSpec(*("fsdp" if axis == split else None for axis in range(len(sizes))))
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    def loss(adapter, base, back, x):
        def block(x, kernels):
            kernel, back = kernels
            return constrain_batch(x + jnp.tanh(ops.linear(x, kernel)) @ back), None

        x, _ = jax.lax.scan(jax.checkpoint(block), x, (LowRank(base, adapter), back))
        return jnp.mean(x.astype(jnp.float32) ** 2)

    def run(*given):
        with current_placement(Placement(mesh)):
            return jax.value_and_grad(loss)(*given)

    adapter = Adapter(
        shape(layers, width, rank, split=1), shape(layers, rank, wide, split=2), scale=0.5
    )
    base, back = shape(layers, width, wide, split=1), shape(layers, wide, width, split=2)
    x = shape(4, tokens, width, split=0)
    text = jax.jit(run).lower(adapter, base, back, x).compile().as_text()
    assert "all-gather" in text and "all-to-all" not in text


if __name__ == "__main__":
    worker()
