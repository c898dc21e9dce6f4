"""Accuracy of a network's tangent and its gradient: jax.jvp beside finite differences."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from benchmarks.common import Figure, Size, cosine, make_batch, make_network, relative

from gadjax.diffusion.geometry import tangent

STEPS = 1e-2, 0.1, 1.0  # of finite differences, along a direction of norm 1
DTYPES = "bfloat16", "float16", "float32"
AIMS = {("jvp", "bfloat16"): (2e-2, 3e-2)}  # error of the tangent, of its gradient
T = 500.0


def accuracy(size: Size, dtypes: tuple[str, ...] = DTYPES) -> Iterator[Figure]:
    """Errors of J v and of the gradient of <c, J v> to the parameters, relative to the float64 jvp.

    v has norm 1. A finite difference subtracts outputs of the network of that dtype, in float32.
    """
    batch = make_batch(size)
    params = jax.jit(make_network(size)[0].init)(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1))
    v, c = (jax.random.normal(key, batch.noise.shape) for key in keys)
    inputs = batch.noise, v / jnp.linalg.norm(v), c, batch.cond

    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, (params, inputs)
        )
        truth = jax.device_get(derivative(size, "float64")(*wide, jnp.float64(0)))
    x, v, *_ = inputs
    with jax.default_matmul_precision("highest"):
        for dtype in dtypes:
            exact, difference = (derivative(size, dtype, exact) for exact in (True, False))
            values = exact(params, inputs, jnp.float32(0))
            yield from compare("jvp", size, dtype, values, truth)
            for h in STEPS:
                values = difference(params, inputs, jnp.float32(h))
                yield from compare(f"difference h={h:g}", size, dtype, values, truth)
                same = jnp.mean((x + h * v).astype(dtype) == x.astype(dtype))
                yield Figure(f"share of inputs that h={h:g} leaves alone, {dtype}", float(same))


def derivative(size: Size, dtype: str, exact: bool = True):
    """Derivatives, jitted: (params, inputs, h) -> (J v, the gradient of <c, J v>)."""
    _, denoiser = make_network(size, jnp.dtype(dtype))

    def loss(params, inputs, h):
        x, v, c, cond = inputs

        def f(x):
            return denoiser.raw(params, x, T, cond)

        dot = tangent(f, x, v)[1] if exact else (f(x + h * v) - f(x)) / h
        return jnp.vdot(c, dot), dot

    def both(*inputs):
        grads, dot = jax.grad(loss, has_aux=True)(*inputs)
        return dot, grads

    return jax.jit(both)


def compare(name: str, size: Size, dtype: str, values, truth) -> Iterator[Figure]:
    values = jax.device_get(values)
    aims = AIMS.get((name, dtype), (None, None))
    for what, a, b, aim in zip(("J v", "its gradient"), values, truth, aims, strict=True):
        yield Figure(f"error of {what}: {name}, {dtype}", relative(a, b), aim, note=str(size))
        yield Figure(f"cosine of {what}: {name}, {dtype}", cosine(a, b))
