import jax
import jax.numpy as jnp
import pytest

from gadjax.training.flops import flops

A, B = jnp.zeros((3, 5)), jnp.zeros((5, 7))
ONE = 2 * 3 * 5 * 7


def test_products_and_what_they_are_nested_in():
    assert flops(jnp.matmul, A, B) == ONE
    assert flops(jax.jit(lambda a, b: jnp.matmul(a, b) + 1), A, B) == ONE
    walk = lambda a, b: jax.lax.scan(lambda s, _: (s + a @ b, None), jnp.zeros((3, 7)), None, 4)  # noqa: E731
    assert flops(walk, A, B) == 4 * ONE
    assert flops(jax.checkpoint(jnp.matmul), A, B) == ONE
    assert flops(jax.vmap(jnp.matmul, (0, None)), jnp.zeros((6, 3, 5)), B) == 6 * ONE


def test_derivatives_cost_what_they_should():
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
