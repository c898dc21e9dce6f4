import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from gadjax.ops.flops import flops

A, B = jnp.zeros((3, 5)), jnp.zeros((5, 7))
ONE = 2 * 3 * 5 * 7


def test_matmuls_and_nested_calls():
    assert flops(jnp.matmul, A, B) == ONE
    assert flops(jax.jit(lambda a, b: jnp.matmul(a, b) + 1), A, B) == ONE
    scanned = lambda a, b: jax.lax.scan(lambda s, _: (s + a @ b, None), jnp.zeros((3, 7)), None, 4)  # noqa: E731
    assert flops(scanned, A, B) == 4 * ONE
    assert flops(jax.checkpoint(jnp.matmul), A, B) == ONE
    assert flops(jax.vmap(jnp.matmul, (0, None)), jnp.zeros((6, 3, 5)), B) == 6 * ONE


def test_derivatives():
    f = lambda a, b: jnp.sum(jnp.tanh(a @ b))  # noqa: E731
    assert flops(jax.grad(f, (0, 1)), A, B) == 3 * ONE
    pushed = lambda a, b: jax.jvp(lambda a: f(a, b), (a,), (a,))  # noqa: E731
    assert flops(pushed, A, B) == 2 * ONE


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions(stride):
    x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert flops(conv, x, kernel) == 2 * 2 * (8 // stride) ** 2 * 5 * 9 * 3


def test_shapes_are_enough():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (A, B)]
    assert flops(jnp.matmul, *shapes) == ONE


def test_shard_map_and_pallas_grid():
    auto = (jax.sharding.AxisType.Auto,)  # newer JAX takes explicit axes by default
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=auto)
    sharded = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert flops(sharded, jnp.zeros((12, 5)), B) == 4 * ONE

    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    blocks = pl.BlockSpec((3, 5), lambda i: (i, 0)), pl.BlockSpec((5, 7), lambda i: (0, 0))
    made = pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=blocks,
        out_specs=pl.BlockSpec((3, 7), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((12, 7), jnp.float32),
        interpret=True,
    )
    assert flops(made, jnp.zeros((12, 5)), B) == 4 * ONE
