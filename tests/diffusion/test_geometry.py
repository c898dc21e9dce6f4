import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.diffusion.geometry import (
    Directions,
    control_directions,
    directions,
    draw_blocks,
    tangent,
    tangents,
)
from gadjax.errors import InputError

N, SHAPE = 20_000, (2, 3, 2)
D = 12
kinds = pytest.mark.parametrize("kind", ["gaussian", "rademacher"])


def drawn(kind, n=N):
    return directions(Directions(kind), jax.random.split(jax.random.key(0), n), SHAPE)[0]


@kinds
def test_second_moment_is_the_identity(kind):
    v = np.asarray(drawn(kind).reshape(N, D), np.float64)
    moment = v.T @ v / N
    # A product of two entries has variance 1, the square of a Gaussian 2.
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
def test_direction_depends_on_its_key_only(kind):
    keys = jax.random.split(jax.random.key(3), 8)
    batch = directions(Directions(kind), keys, SHAPE)[0]
    assert batch.shape == (8, *SHAPE) and batch.dtype == jnp.float32
    np.testing.assert_array_equal(batch[5:6], directions(Directions(kind), keys[5:6], SHAPE)[0])
    assert len(np.unique(np.asarray(batch).reshape(8, -1), axis=0)) == 8
    assert directions(Directions(kind), keys, SHAPE, jnp.bfloat16).dtype == jnp.bfloat16


def test_unknown_kind():
    with pytest.raises(InputError, match="found 'sphere'; expected one of gaussian"):
        Directions("sphere")


def test_tangent_is_j_v_and_is_differentiable():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        w, x, v = (jnp.asarray(rng.normal(size=s)) for s in ((5, 4), (4,), (4,)))
        f = lambda w, x: jnp.sin(w @ x) ** 2  # noqa: E731

        value, pushed = tangent(lambda x: f(w, x), x, v)
        np.testing.assert_array_equal(value, f(w, x))
        np.testing.assert_allclose(pushed, jax.jacobian(f, 1)(w, x) @ v, rtol=1e-12)

        def loss(w):
            return (tangent(lambda x: f(w, x), x, v)[1] ** 2).sum()

        direction = jnp.asarray(rng.normal(size=w.shape))
        h = 1e-5
        slope = (loss(w + h * direction) - loss(w - h * direction)) / (2 * h)
        assert float((jax.grad(loss)(w) * direction).sum()) == pytest.approx(float(slope), rel=1e-8)


def test_low_frequency_noise_is_constant_on_its_cells():
    v = directions(
        Directions("low_frequency"), jax.random.split(jax.random.key(0), 4000), (8, 8, 2)
    )
    v = np.asarray(v[0])
    blocks = v.reshape(-1, 4, 2, 4, 2, 2)
    assert (blocks == blocks[:, :, :1, :, :1]).all()
    assert abs(v.var() - 1) < 0.02
    assert len(np.unique(v[0])) == 32


def test_several_directions_share_the_primal():
    keys = jax.random.split(jax.random.key(1), 5)
    v = directions(Directions(count=3), keys, SHAPE)
    assert v.shape == (3, 5, *SHAPE)
    np.testing.assert_array_equal(v[0], directions(Directions(), keys, SHAPE)[0])
    assert len(np.unique(np.asarray(v).reshape(15, -1), axis=0)) == 15
    calls = []

    def f(x):
        jax.debug.callback(lambda: calls.append(1))
        return {"sine": jnp.sin(x), "cube": x**3}

    x = jnp.linspace(-1, 1, 60).reshape(5, *SHAPE)
    value, dot = tangents(f, x, v)
    jax.effects_barrier()
    assert len(calls) == 1
    np.testing.assert_allclose(value["cube"], x**3, rtol=1e-6)
    np.testing.assert_allclose(dot["sine"], jnp.cos(x) * v, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dot["cube"], 3 * x**2 * v, rtol=1e-5, atol=1e-6)
    alone = tangents(f, x, v[:1])
    np.testing.assert_allclose(alone[1]["sine"], dot["sine"][:1], rtol=1e-6, atol=1e-7)


def test_control_directions_are_gradients_of_norm_sqrt_d():
    """The gradient of a linear map A x is A^T w, against NumPy."""
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(D, D)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(6, *SHAPE)), jnp.float32)
    keys = jax.random.split(jax.random.key(2), 6)
    v = control_directions(lambda x: (x.reshape(6, D) @ matrix.T).reshape(x.shape), x, keys, 2)
    w = directions(Directions("low_frequency", 2), keys, SHAPE)
    expected = np.asarray(w).reshape(2, 6, D) @ np.asarray(matrix)
    expected *= np.sqrt(D) / np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(v).reshape(2, 6, D), expected, rtol=1e-4, atol=1e-5)


def test_directions_of_the_wrong_shape():
    x = jnp.zeros((2, *SHAPE))
    with pytest.raises(InputError, match=r"directions: found shape .* expected \(J, 2, 2, 3, 2\)"):
        tangents(jnp.sin, x, jnp.zeros((1, 3, *SHAPE)))
    with pytest.raises(InputError, match="directions: found 0; expected 1 or more"):
        Directions(count=0)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_one_of_every_block_is_chosen(k):
    keys = jax.random.split(jax.random.key(0), 12)
    blocks, x = draw_blocks(k, keys), {"a": jnp.arange(24.0).reshape(12, 2), "key": keys}
    place = np.arange(12) // k * k + np.repeat(blocks.index_N, k) == np.arange(12)
    chosen, rest = (jax.tree.map(pick, x) for pick in (blocks.chosen, blocks.rest))
    assert len(chosen["a"]) == 12 // k and len(rest["a"]) == 12 - 12 // k
    np.testing.assert_array_equal(chosen["a"], x["a"][place])
    np.testing.assert_array_equal(rest["a"], x["a"][~place])
    assert (chosen["key"] == keys[place]).all()
    np.testing.assert_array_equal(blocks.join(chosen["a"], rest["a"]), x["a"])
    spread = blocks.spread(jnp.arange(1.0, 12 // k + 1))
    np.testing.assert_array_equal(spread[place], k * np.arange(1, 12 // k + 1))
    assert not spread[~place].any()


def test_every_sample_of_a_block_is_chosen_as_often():
    keys = jax.random.split(jax.random.key(0), 4 * 4000)
    counts = np.bincount(draw_blocks(4, keys).index_N, minlength=4)
    assert np.abs(counts - 1000).max() < 4 * (4000 * 0.25 * 0.75) ** 0.5
