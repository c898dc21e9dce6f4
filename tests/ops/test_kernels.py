"""Attention by Pallas kernels against attention in blocks, in the same programs."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import case, truth, worst
from jax.sharding import NamedSharding, PartitionSpec

from gadjax.diffusion.geometry import tangents
from gadjax.ops import kernels, pallas_gpu, pallas_tpu
from gadjax.ops.attention import attention
from gadjax.parallel.placement import Placement, current_placement
from gadjax.parallel.sharding import BATCH_AXES, make_mesh

B, N, H, K = 2, 40, 2, 8


@pytest.fixture
def place(monkeypatch):
    """Placement on one CPU device as if it were a TPU, with interpreted kernels."""
    calls = []

    def interpreted(name):
        def call(*operands):
            calls.append(name)
            return getattr(pallas_tpu, name)(*operands, interpret=True)

        return call

    module = SimpleNamespace(
        supported=lambda q, k, bias: True,
        **{name: interpreted(name) for name in ("value", "dual", "dual_transpose")},
    )
    monkeypatch.setitem(kernels.KERNEL_MODULES, "tpu", module)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    return SimpleNamespace(on=Placement(mesh, "tpu"), off=Placement(mesh), calls=calls)


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("count", [1, 2])
def test_tangents_and_gradients_through_them(place, count):
    x, text, *v = arrays((B, N, H, K), (B, 11, H, K), *[(B, N, H, K)] * count)
    bias = jnp.zeros((B, 1, 1, 11)).at[0, ..., 5:].set(-10_000.0)

    @partial(jax.jit, static_argnums=2)
    def run(x, text, place):
        def net(x):
            return attention(x + attention(x, text, text + 1, bias), x, 2 * x)

        def loss(x, text):
            value, tangent_out = tangents(net, x, jnp.stack(v))
            return jnp.sum(value**2) + jnp.sum(tangent_out**3), (value, tangent_out)

        with current_placement(place):
            return jax.grad(lambda x, text: loss(x, text)[0], (0, 1))(x, text), loss(x, text)[1]

    actual = run(x, text, place.on)
    assert {"dual", "dual_transpose"} <= set(place.calls) and "value" not in place.calls
    close(actual, run(x, text, place.off))


def test_reverse_mode_in_bfloat16_uses_rounding_errors(place):
    """Keys and values with a common component, where rounded results alone give errors of 0.1."""
    args, cotangents = case(40, 50, channels=K, dtype=jnp.bfloat16, shared=3)
    chosen = kernels.Kernels(kernels.KERNEL_MODULES["tpu"], place.on.mesh)

    @jax.jit
    def run(args, cotangents):
        actual, transpose = jax.vjp(partial(kernels.dual_with_kernels, chosen), *args)
        dq, dk, dv, _, *moving = transpose(cotangents)
        return actual, (dq, dk, dv, *moving)

    assert worst(run(args, cotangents), truth(args, cotangents)) <= 2e-2


def test_values(place):
    q, k, v = arrays((B, N, H, K), (B, 11, H, K), (B, 11, H, K))

    def run(place):
        with current_placement(place):
            return jax.value_and_grad(lambda *x: jnp.sum(attention(*x) ** 2), (0, 1, 2))(q, k, v)

    actual = run(place.on)
    assert set(place.calls) == {"value"}
    close(actual, run(place.off))


def test_unsupported_operands_use_blocks(place, monkeypatch):
    (x,) = arrays((B, N, H, K))
    monkeypatch.setattr(kernels.KERNEL_MODULES["tpu"], "supported", lambda q, k, bias: False)
    with current_placement(place.on):
        close(attention(x, x, x), attention(x, x, x))
    assert not place.calls


@pytest.mark.parametrize("count,axis", [(1, "tensor"), (2, "tensor"), (2, "sequence")])
def test_step_compiles_for_four_tpus(count, axis):
    """Ahead-of-time compilation with scan, rematerialisation and jax.shard_map."""
    pytest.importorskip("libtpu")
    from gadjax.models.module import scan_blocks
    from gadjax.parallel.hardware import find_topology

    mesh = make_mesh({"data": 1, "fsdp": 2, axis: 2}, find_topology("v5e:2x2").devices())
    shape = jax.ShapeDtypeStruct(
        (2, 512, 2, 64), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    )
    layers = jax.ShapeDtypeStruct(
        (2, 64, 64), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )

    @jax.jit
    def step(layers, x):
        def loss(layers):
            def net(x):
                return scan_blocks(layers, x, lambda w, x: attention(x @ w, x, x), "results")

            value, tangent_out = tangents(net, x, jnp.stack([x] * count))
            return jnp.sum(value.astype(jnp.float32)) + jnp.sum(tangent_out.astype(jnp.float32))

        with current_placement(Placement(mesh, "tpu")):
            return jax.grad(loss)(layers)

    text = step.lower(layers, shape).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 3


@pytest.mark.slow
def test_gpu_kernels_are_validated(monkeypatch, caplog):
    def dual(*operands, tangent=1.0):
        o, to, *rows = pallas_gpu.dual(*operands, interpret=True)
        return o, tangent * to, *rows

    def refuse(*operands):
        raise ValueError("no such instruction")

    transpose = partial(pallas_gpu.dual_transpose, interpret=True)
    for forward, dtype, right, message in (
        (dual, "bfloat16", True, ""),
        (dual, "float32", True, ""),
        (partial(dual, tangent=0.91), "bfloat16", False, "their relative error is 0.0"),
        (refuse, "float32", False, "they do not compile: no such instruction"),
    ):
        caplog.clear()
        module = SimpleNamespace(dual=forward, dual_transpose=transpose)
        monkeypatch.setitem(kernels.KERNEL_MODULES, "gpu", module)
        assert kernels.kernels_validated.__wrapped__("gpu", dtype) is right
        assert message in caplog.text and bool(caplog.text) is not right
