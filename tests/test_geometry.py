import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.geometry import directions, tangent

N, SHAPE = 20_000, (2, 3, 2)
D = 12
kinds = pytest.mark.parametrize("kind", ["gaussian", "rademacher"])


def drawn(kind, n=N):
    return directions(kind, jax.random.split(jax.random.key(0), n), SHAPE)


@kinds
def test_second_moment_is_the_identity(kind):
    v = np.asarray(drawn(kind).reshape(N, D), np.float64)
    moment = v.T @ v / N
    # A product of two entries has variance 1, a gaussian's square 2.
    assert np.abs(moment - np.eye(D)).max() < 5 * np.sqrt(2 / N)
    assert np.abs(v.mean(0)).max() < 5 / np.sqrt(N)
    if kind == "rademacher":
        assert set(np.unique(v)) == {-1.0, 1.0}


@kinds
def test_random_directions_measure_the_frobenius_norm(kind):
    jacobian = jnp.asarray(np.random.default_rng(0).normal(size=(7, D)), jnp.float32)
    point = jnp.linspace(-1, 1, D).reshape(SHAPE)

    def f(x):
        return jnp.tanh(jacobian @ x.reshape(D) / 4)

    exact = float((jax.jacobian(f)(point) ** 2).sum())
    squares = jax.vmap(lambda v: (tangent(f, point, v)[1] ** 2).sum())(drawn(kind))
    error = float(squares.std()) / np.sqrt(N)
    assert abs(float(squares.mean()) - exact) < 5 * error
    assert error < 0.01 * exact


@kinds
def test_a_direction_depends_on_its_own_key_alone(kind):
    keys = jax.random.split(jax.random.key(3), 8)
    whole = directions(kind, keys, SHAPE)
    assert whole.shape == (8, *SHAPE) and whole.dtype == jnp.float32
    np.testing.assert_array_equal(whole[5:6], directions(kind, keys[5:6], SHAPE))
    assert len(np.unique(np.asarray(whole).reshape(8, -1), axis=0)) == 8
    assert directions(kind, keys, SHAPE, jnp.bfloat16).dtype == jnp.bfloat16


def test_unknown_kind():
    with pytest.raises(InputError, match="found 'sphere'; expected gaussian or rademacher"):
        directions("sphere", jax.random.split(jax.random.key(0), 2), SHAPE)


def test_tangent_is_j_v_and_reverse_mode_passes():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        w, x, v = (jnp.asarray(rng.normal(size=s)) for s in ((5, 4), (4,), (4,)))
        f = lambda w, x: jnp.sin(w @ x) ** 2  # noqa: E731

        value, pushed = tangent(lambda x: f(w, x), x, v)
        np.testing.assert_array_equal(value, f(w, x))
        np.testing.assert_allclose(pushed, jax.jacobian(f, 1)(w, x) @ v, rtol=1e-12)

        def loss(w):
            return (tangent(lambda x: f(w, x), x, v)[1] ** 2).sum()

        way = jnp.asarray(rng.normal(size=w.shape))
        h = 1e-5
        slope = (loss(w + h * way) - loss(w - h * way)) / (2 * h)
        assert float((jax.grad(loss)(w) * way).sum()) == pytest.approx(float(slope), rel=1e-8)
