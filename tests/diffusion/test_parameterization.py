import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.diffusion.parameterization import PARAMETERIZATIONS, from_prediction, to_prediction
from gadjax.diffusion.schedules import DDPM, Flow, add_noise
from gadjax.types import Prediction

SCHEDULES = {"ddpm": DDPM(), "scaled": DDPM(0.00085, 0.012, "scaled_linear"), "flow": Flow()}
TIMES = np.array([0.0, 1.0, 20.5, 224.0, 500.0, 899.0, 999.0])


def drawn(schedule, times, dtype):
    """x0, eps [n, 2, 3, 4], x_t of the same shape, alpha and sigma [n], in `dtype`."""
    rng = np.random.default_rng(0)
    shape = (len(times), 2, 3, 4)
    x0, eps = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    alpha, sigma = (jnp.asarray(v, dtype) for v in schedule.alpha_sigma(np.asarray(times)))
    return x0, eps, add_noise(schedule, x0, eps, jnp.asarray(times, dtype)), alpha, sigma


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_round_trips(kind, schedule):
    times = TIMES[TIMES > schedule.clean]
    with jax.enable_x64(True):
        x0, eps, x_t, alpha, sigma = drawn(schedule, times, jnp.float64)
        raw = from_prediction(kind, Prediction(x0, eps), alpha, sigma)
        prediction = to_prediction(kind, raw, x_t, alpha, sigma)
        assert prediction.x0.dtype == jnp.float64
        # One rounding is 1e-16, magnified by 1 / alpha and 1 / sigma, at most 1000 here.
        np.testing.assert_allclose(prediction.x0, x0, atol=1e-12)
        np.testing.assert_allclose(prediction.eps, eps, atol=1e-12)
        again = from_prediction(kind, prediction, alpha, sigma)
        np.testing.assert_allclose(again, raw, atol=1e-12)
        for other in PARAMETERIZATIONS:
            there = from_prediction(other, prediction, alpha, sigma)
            back = from_prediction(
                kind, to_prediction(other, there, x_t, alpha, sigma), alpha, sigma
            )
            np.testing.assert_allclose(back, raw, atol=1e-12)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_prediction_is_consistent_with_x_t(kind):
    """Any raw output converts to x0 and eps with alpha x0 + sigma eps = x_t."""
    with jax.enable_x64(True):
        raw, _, _, alpha, sigma = drawn(DDPM(), TIMES, jnp.float64)
        x_t = jnp.cos(3 * raw)
        x0, eps = to_prediction(kind, raw, x_t, alpha, sigma)
        alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in (alpha, sigma))
        np.testing.assert_allclose(alpha * x0 + sigma * eps, x_t, atol=1e-12)


def test_definitions():
    x0, eps, x_t, alpha, sigma = drawn(DDPM(), [500.0], jnp.float32)
    pair = Prediction(x0, eps)
    assert from_prediction("eps", pair, alpha, sigma) is eps
    assert from_prediction("x0", pair, alpha, sigma) is x0
    a, s = float(alpha[0]), float(sigma[0])
    np.testing.assert_allclose(from_prediction("v", pair, a, s), a * eps - s * x0, atol=1e-6)
    np.testing.assert_allclose(from_prediction("flow", pair, a, s), eps - x0, atol=1e-6)
    for kind in PARAMETERIZATIONS:  # scalars and [B] mean the same
        raw = from_prediction(kind, pair, alpha, sigma)
        for one, many in zip(
            to_prediction(kind, raw, x_t, a, s),
            to_prediction(kind, raw, x_t, alpha, sigma),
            strict=True,
        ):
            np.testing.assert_allclose(one, many, atol=1e-6)


def float32_error(kind, t):
    """Largest errors of x0 and eps converted in float32 at time t."""
    with jax.enable_x64(True):
        x0, eps, x_t, alpha, sigma = drawn(DDPM(), np.full(100, t), jnp.float64)
        raw = from_prediction(kind, Prediction(x0, eps), alpha, sigma)
        prediction = to_prediction(kind, *(v.astype(jnp.float32) for v in (raw, x_t, alpha, sigma)))
        assert prediction.x0.dtype == jnp.float32
        return float(jnp.abs(prediction.x0 - x0).max()), float(jnp.abs(prediction.eps - eps).max())


@pytest.mark.parametrize("kind,side,t,factor", [("eps", 0, 999.0, 157), ("x0", 1, 0.0, 100)])
def test_float32_error_grows_as_stated(kind, side, t, factor):
    unit = 2.0**-24
    schedule = DDPM()
    alpha, sigma = schedule.alpha_sigma(t)
    assert 1 / (alpha if side == 0 else sigma) == pytest.approx(factor, rel=0.01)
    assert 2 * unit < float32_error(kind, 500.0)[side] < 20 * unit
    # A few roundings of numbers up to 4 or so, times the factor.
    assert factor * unit < float32_error(kind, t)[side] < 10 * factor * unit
    assert max(float32_error("v", t)) < 20 * unit


def test_unknown_kinds():
    one = jnp.ones((1, 1, 1, 1))
    with pytest.raises(ValueError):
        to_prediction("noise", one, one, 1.0, 1.0)
    with pytest.raises(ValueError):
        from_prediction("noise", Prediction(one, one), 1.0, 1.0)
