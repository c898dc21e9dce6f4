"""Test cases of dual attention, and errors of a backend's kernels on them."""

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.ops.attention import value_attention
from gadjax.ops.dual_attention import dual_attention


def case(queries, keys, *, channels=72, moving=True, masked=False, dtype=np.float32, shared=0):
    """q, k, v, bias, tq, tk, tv and do, eo for a batch of two and two heads.

    masked: half of the first sample's keys, and all of the second's. shared: added to keys and
    values.
    """
    r = np.random.default_rng(0)

    def normal(n, mean=0):
        return jnp.asarray(mean + r.standard_normal((2, n, 2, channels)), dtype)

    q, tq, do, eo = (normal(queries) for _ in range(4))
    k, v, tk, tv = (normal(keys, mean) for mean in (shared, shared, 0, 0))
    bias = np.zeros((2, 1, 1, keys), np.float32)
    bias[0, ..., keys // 2 :] = bias[1] = -10_000.0
    tk, tv = (tk, tv) if moving else (None, None)
    return (q, k, v, jnp.asarray(bias) if masked else None, tq, tk, tv), (do, eo)


def both(module, **options):
    """Build f(args, cotangents) -> (o, o.) and the six results of the transpose."""

    def f(args, cotangents):
        actual = module.dual(*args, **options)
        return actual[:2], module.dual_transpose(*cotangents, *args, *actual, **options)

    return f


@jax.jit
def _op(args, cotangents):
    actual, transpose = jax.vjp(dual_attention, *args)
    dq, dk, dv, _, *moving = transpose(cotangents)
    return actual, (dq, dk, dv, *moving)


def truth(args, cotangents):
    """Reference: the jnp op in float64."""
    with jax.enable_x64(True):
        return _op(*jax.tree.map(lambda x: x.astype(jnp.float64), (args, cotangents)))


def worst(actual, expected):
    """Largest error of any result, relative to the largest magnitude of that result."""
    actual, expected = (
        [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (actual, expected)
    )
    errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(actual, expected, strict=True)]
    assert np.isfinite(errors).all()
    return max(errors)


def error(module, args, cotangents):
    """Error (`worst`) of a module's kernels in Pallas' interpreter."""
    actual = jax.jit(both(module, interpret=True))(args, cotangents)
    for x, like in zip(actual[1], (*args[:3], *args[4:]), strict=True):
        assert x is like is None or (x.shape, x.dtype) == (like.shape, like.dtype)
    return worst(actual, truth(args, cotangents))


def error_of_directions(module, args, cotangents):
    """Error (`worst`) under jax.vmap over two directions of one value."""
    twice = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (args[4:], cotangents))

    def run(f):
        return lambda moving: f((*args[:4], *moving[0]), moving[1])

    actual = jax.jit(jax.vmap(run(both(module, interpret=True))))(twice)
    separate = [run(truth)(jax.tree.map(lambda x, i=i: x[i], twice)) for i in range(2)]
    return worst(actual, jax.tree.map(lambda *x: np.stack(x), *separate))


def error_of_value(module, args, cotangents):
    """Error (`worst`) of `value` and its gradient."""
    q, k, v, bias = args[:4]

    def run(f):
        return jax.jit(lambda q, k, v: (lambda o, t: (o, t(cotangents[0])))(*jax.vjp(f, q, k, v)))

    actual = run(lambda *x: module.value(*x, bias, interpret=True))(q, k, v)
    with jax.enable_x64(True):
        q, k, v = (x.astype(jnp.float64) for x in (q, k, v))
        cotangents = [cotangents[0].astype(jnp.float64)]
        return worst(actual, run(lambda *x: value_attention(*x, bias))(q, k, v))
