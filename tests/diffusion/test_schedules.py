from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gadjax.diffusion.schedules import DDPM, Flow, TrigFlow, add_noise, renoise, shift_time
from gadjax.errors import InputError
from gadjax.objectives.consistency import uniform_angle
from gadjax.objectives.time_laws import uniform_timesteps
from gadjax.types import expand

torch.set_num_threads(1)

BETAS = {
    "linear": dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    "scaled_linear": dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
}
SCHEDULES = {"linear": DDPM(**BETAS["linear"]), "scaled": DDPM(**BETAS["scaled_linear"])}
SCHEDULES["flow"] = Flow()
all_schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
def test_ddpm_equals_the_diffusers_tables(betas):
    theirs = diffusers.DPMSolverMultistepScheduler(**betas)
    alpha, sigma = DDPM(**betas).alpha_sigma(np.arange(1000))
    bar = theirs.alphas_cumprod.double().numpy()
    # Relative, because x0 from eps divides by alpha and eps from x0 by sigma.
    np.testing.assert_allclose(alpha, np.sqrt(bar), rtol=1e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1 - bar), rtol=1e-6)
    np.testing.assert_allclose(alpha, theirs.alpha_t.numpy(), rtol=1e-6)
    np.testing.assert_allclose(sigma, theirs.sigma_t.numpy(), rtol=1e-6)


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
def test_ddpm_with_another_number_of_steps(betas):
    theirs = diffusers.DDPMScheduler(num_train_timesteps=300, **betas)
    schedule = DDPM(steps=300, **betas)
    alpha, _ = schedule.alpha_sigma(np.arange(300))
    np.testing.assert_allclose(alpha, theirs.alphas_cumprod.sqrt().numpy(), rtol=1e-6)
    assert schedule.last == 299


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_shifted_flow_times_equal_the_diffusers_table(shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    times = shift_time(np.arange(1000, 0, -1), shift)
    alpha, sigma = Flow().alpha_sigma(times)
    np.testing.assert_allclose(sigma, theirs.sigmas.numpy(), atol=1e-6)
    np.testing.assert_allclose(alpha, 1 - theirs.sigmas.numpy(), atol=1e-6)
    np.testing.assert_allclose(times, theirs.timesteps.numpy(), rtol=1e-6)


def test_timesteps_of_losses():
    """A thousand timesteps, for angles too; between fractions of the span if a loss sets them."""
    share = jnp.linspace(0, 1 - 2**-23, 5001)
    for schedule in (DDPM(), Flow(), TrigFlow()):
        context = SimpleNamespace(schedule=schedule, uniform=lambda name: share)
        span, spacing = schedule.last - schedule.clean, schedule.spacing
        for low, high in ((0.0, 1.0), (0.02, 0.98), (0.3, 0.3)):
            t = np.asarray(uniform_timesteps(context, low, high), float)
            np.testing.assert_allclose(t[0], schedule.clean + low * span + spacing, atol=1e-3)
            last = max(high, low + 1 / 1000) * span + schedule.clean
            np.testing.assert_allclose(t[-1], last, atol=1e-3)
            assert len(np.unique(t)) == max(1, round((high - low) * 1000))
            if spacing == 1:
                np.testing.assert_array_equal(t, np.floor(t))


def test_angles_of_consistency():
    share = jnp.linspace(0, 1, 101)
    for schedule, start in ((DDPM(), 899.0), (Flow(), 1000.0), (TrigFlow(), 1.5)):
        context = SimpleNamespace(schedule=schedule, times=(start,), uniform=lambda name: share)
        t = uniform_angle(context)
        alpha, sigma = schedule.alpha_sigma(t)
        np.testing.assert_allclose(t[0], schedule.clean + schedule.spacing, atol=1e-5)
        np.testing.assert_allclose(t[-1], start, rtol=1e-6)
        angle = np.arctan2(sigma, alpha)
        np.testing.assert_allclose(np.diff(angle), np.diff(angle).mean(), rtol=0.02)


@all_schedules
def test_end_points(schedule):
    alpha, sigma = schedule.alpha_sigma(np.array([schedule.clean, schedule.last]))
    assert alpha[0] == 1 and sigma[0] == 0
    assert alpha[1] < 0.07 and sigma[1] > 0.99


@all_schedules
@pytest.mark.parametrize("t", [0.0, 0.25, 17.5, 998.0, 998.75])
def test_jax_equals_numpy_and_interpolates(schedule, t):
    here = np.array(schedule.alpha_sigma(t))
    np.testing.assert_allclose(jax.jit(schedule.alpha_sigma)(t), here, rtol=1e-5, atol=1e-7)
    below, above = (np.array(schedule.alpha_sigma(n)) for n in (np.floor(t), np.floor(t) + 1))
    np.testing.assert_allclose(here, below + (t % 1) * (above - below), rtol=1e-12)
    with jax.enable_x64(True):
        exact = schedule.alpha_sigma(jnp.asarray(t, jnp.float64))
        assert exact[0].dtype == jnp.float64
        np.testing.assert_allclose(exact, here, rtol=1e-12)


@all_schedules
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16])
def test_time_dtype_does_not_round_alpha_sigma(schedule, dtype):
    t = jnp.asarray([0, 3, 96, 512], dtype)
    for actual, expected in zip(
        schedule.alpha_sigma(t), schedule.alpha_sigma(np.array([0, 3, 96, 512])), strict=True
    ):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_unknown_betas_are_refused():
    with pytest.raises(InputError, match="beta_schedule: found 'squaredcos_cap_v2'; expected"):
        DDPM(beta_schedule="squaredcos_cap_v2").alpha_sigma(np.zeros(1))


def test_expand():
    x = jnp.zeros((2, 3, 4, 5))
    assert expand(jnp.zeros(2), x).shape == (2, 1, 1, 1)
    assert expand(np.zeros(2), x).shape == (2, 1, 1, 1)
    assert expand(0.5, x) == 0.5 and jnp.ndim(expand(jnp.float32(1), x)) == 0


def draw(*seeds, shape=(3, 4, 5, 2)):
    return tuple(np.random.default_rng(s).normal(size=shape).astype(np.float32) for s in seeds)


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
def test_add_noise_equals_diffusers_on_ddpm(betas):
    x0, eps = draw(0, 1)
    t = [0, 431, 999]
    theirs = diffusers.DDPMScheduler(**betas).add_noise(
        torch.tensor(x0), torch.tensor(eps), torch.tensor(t)
    )
    for times in (jnp.asarray(t), jnp.asarray(t, jnp.float32), np.array(t)):
        np.testing.assert_allclose(add_noise(DDPM(**betas), x0, eps, times), theirs, atol=1e-6)


def test_add_noise_equals_diffusers_on_flow():
    x0, eps = draw(0, 1)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = theirs.timesteps[[0, 300, 998]]
    noised = theirs.scale_noise(torch.tensor(x0), t, torch.tensor(eps))
    np.testing.assert_allclose(
        add_noise(Flow(), x0, eps, jnp.asarray(t.numpy())), noised, atol=1e-6
    )


@all_schedules
def test_clean_time_is_x0(schedule):
    x0, eps = draw(0, 1)
    clean = jnp.full(3, schedule.clean)
    np.testing.assert_array_equal(add_noise(schedule, x0, eps, clean), x0)
    np.testing.assert_array_equal(renoise(schedule, x0, clean, clean, eps), x0)
    t = jnp.array([20.0, 400.0, 999.0])
    np.testing.assert_allclose(
        renoise(schedule, x0, clean, t, eps), add_noise(schedule, x0, eps, t), atol=1e-6
    )


def linear_map(schedule, s, t):
    """Coefficients of x_s and eps in renoise."""
    one, zero = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
    s, t = jnp.array([s]), jnp.array([t])
    ratio, spread = renoise(schedule, one, s, t, zero), renoise(schedule, zero, s, t, one)
    return float(ratio[0, 0, 0, 0]), float(spread[0, 0, 0, 0])


@all_schedules
@pytest.mark.parametrize("r,s,t", [(0.0, 5.0, 30.0), (20.0, 224.0, 899.0), (300.5, 700.25, 998.0)])
def test_renoise_is_the_forward_process(schedule, r, s, t):
    with jax.enable_x64(True):
        ratio, spread = linear_map(schedule, s, t)
        alpha, sigma = schedule.alpha_sigma(np.array([s, t]))
        # x0 -> s -> t has the mean and the variance of x0 -> t.
        assert ratio * alpha[0] == pytest.approx(alpha[1], rel=1e-12)
        assert (ratio * sigma[0]) ** 2 + spread**2 == pytest.approx(sigma[1] ** 2, rel=1e-12)
        # r -> s -> t is r -> t.
        first, first_spread = linear_map(schedule, r, s)
        direct, direct_spread = linear_map(schedule, r, t)
        assert first * ratio == pytest.approx(direct, rel=1e-12)
        assert (ratio * first_spread) ** 2 + spread**2 == pytest.approx(direct_spread**2, rel=1e-11)


@all_schedules
def test_renoise_to_the_same_time_is_identity(schedule):
    x, eps = draw(0, 1)
    t = jnp.array([20.0, 400.0, 998.0])
    np.testing.assert_allclose(renoise(schedule, x, t, t, eps), x, atol=1e-6)


def test_renoise_statistics():
    """Mean and variance of 40 000 draws, to five standard errors."""
    schedule, s, t, x0 = DDPM(), 224.0, 674.0, 0.7
    a, b = (np.random.default_rng(i).normal(size=(40_000, 1, 1, 1)) for i in range(2))
    x_s = add_noise(schedule, x0 * np.ones_like(a), a, np.full(40_000, s))
    x_t = np.asarray(renoise(schedule, x_s, np.full(40_000, s), np.full(40_000, t), b))
    alpha, sigma = schedule.alpha_sigma(t)
    assert abs(x_t.mean() - alpha * x0) < 5 * sigma / 200
    assert abs(x_t.var() / sigma**2 - 1) < 5 * np.sqrt(2 / 40_000)
