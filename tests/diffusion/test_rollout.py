import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.diffusion.geometry import tangent
from gadjax.diffusion.rollout import FreshNoise, Orders, coefficients, interpolate_times, rollout
from gadjax.diffusion.schedules import DDPM, Flow
from gadjax.types import Prediction, expand

SCHEDULES = {"ddpm": DDPM(), "flow": Flow()}
all_schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
orders = pytest.mark.parametrize("order", [1, 2])

B, SHAPE = 3, (3, 2, 2, 2)
TIMES = {
    "ddpm": np.array([899.0, 674.0, 449.0, 224.0, -1.0]),
    "flow": np.array([990.0, 900.0, 750.0, 500.0, 0.0]),
}


def grid(schedule):
    return TIMES["flow" if isinstance(schedule, Flow) else "ddpm"]


def drawn(seed, shape=SHAPE, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def smooth(schedule, w):
    """Analytic denoiser, x0 = tanh(x w + t): nonlinear in x, so that its Jacobian varies."""

    def predict(x, t):
        x0 = jnp.tanh(x @ w + expand(jnp.cos(t / 300), x))
        alpha, sigma = schedule.alpha_sigma(t)
        return Prediction(x0, (x - expand(alpha, x) * x0) / expand(sigma, x))

    return predict


def gaussian(schedule, mean, variance):
    """Ideal denoiser of x0 ~ N(mean, diag variance): the posterior mean."""

    def predict(x, t):
        alpha, sigma = (expand(v, x) for v in schedule.alpha_sigma(t))
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        x0 = mean + gain * (x - alpha * mean)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return predict


def gaussian_map(schedule, mean, variance, x, start, end):
    """Exact solution of its probability-flow ODE from time start to time end, and its slope."""
    (alpha, sigma), (alpha_end, sigma_end) = (schedule.alpha_sigma(t) for t in (start, end))
    slope = np.sqrt((alpha_end**2 * variance + sigma_end**2) / (alpha**2 * variance + sigma**2))
    return alpha_end * mean + slope * (x - alpha * mean), slope


@all_schedules
def test_order_1_is_ddim(schedule):
    """x_next = alpha x0 + sigma eps, and in a flow also Euler's x + (t_next - t) v."""
    times, x = grid(schedule), drawn(0)
    trajectory = rollout(smooth(schedule, drawn(1, (2, 2))), schedule, x, times)
    assert trajectory.x.shape == trajectory.prediction.x0.shape == (4, *SHAPE)
    np.testing.assert_array_equal(trajectory.x[0], x)
    trajectory = jax.device_get(trajectory)
    arrived = [*trajectory.x[1:], trajectory.end]
    alpha, sigma = schedule.alpha_sigma(times)
    for i, (x0, eps) in enumerate(zip(*trajectory.prediction, strict=True)):
        expected = alpha[i + 1] * x0 + sigma[i + 1] * eps
        np.testing.assert_allclose(arrived[i], expected, rtol=1e-5, atol=1e-5)
        if isinstance(schedule, Flow):
            euler = trajectory.x[i] + (times[i + 1] - times[i]) / 1000 * (eps - x0)
            np.testing.assert_allclose(arrived[i], euler, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(trajectory.end, trajectory.prediction.x0[-1], rtol=1e-6, atol=1e-6)


@all_schedules
def test_order_2_is_dpm_solver_2m(schedule):
    """Equals algorithm 2 of Lu et al. (2022), written out step by step."""
    times = grid(schedule)
    alpha, sigma = schedule.alpha_sigma(times)
    lam = np.log(alpha[:-1]) - np.log(sigma[:-1])
    with jax.enable_x64(True):
        predict, x = jax.jit(smooth(schedule, drawn(1, (2, 2), float))), drawn(0, dtype=float)
        trajectory = rollout(predict, schedule, x, times, solver=Orders(2))
        before = None
        for i in range(4):
            np.testing.assert_allclose(trajectory.x[i], x, rtol=1e-11, atol=1e-12)
            x0 = predict(x, jnp.asarray(times[i])).x0
            x, x0 = np.asarray(x), np.asarray(x0)
            mixed = x0
            if 0 < i < 3:
                r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
                mixed = (1 + 1 / (2 * r)) * x0 - before / (2 * r)
            factor = 0 if i == 3 else np.exp(-(lam[i + 1] - lam[i]))
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (factor - 1) * mixed
            before = x0
        np.testing.assert_allclose(trajectory.end, x, rtol=1e-11, atol=1e-12)


@all_schedules
@orders
def test_numpy_and_jax_times_agree(schedule, order):
    times = grid(schedule)
    exact = coefficients(schedule, times, Orders(order))
    traced = jax.jit(lambda t: coefficients(schedule, t, Orders(order)))(
        jnp.asarray(times, jnp.float32)
    )
    for a, b in zip(exact, traced, strict=True):
        assert a.dtype == np.float64 and np.all(np.isfinite(a))
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


@orders
def test_flow_starts_at_pure_noise(order):
    """At time 1000 alpha is 0 and log(alpha / sigma) is not finite."""
    actual = coefficients(Flow(), np.array([1000.0, 600.0, 300.0, 0.0]), Orders(order))
    assert np.all(np.isfinite(np.array(actual)))
    assert actual[1][0] == pytest.approx(0.4)


@orders
@pytest.mark.parametrize("schedule,as_jax", [(DDPM(), False), (DDPM(), True), (Flow(), True)])
def test_times_per_sample(schedule, order, as_jax):
    full = grid(schedule)
    times = np.stack([full, full * 0.9, np.linspace(full[1], full[3], 5)], axis=1)
    predict, x = smooth(schedule, drawn(1, (2, 2))), drawn(0)

    def trajectory(x, times):
        return rollout(predict, schedule, x, times, solver=Orders(order))

    if as_jax:
        trajectory, times = jax.jit(trajectory), jnp.asarray(times, jnp.float32)
    together = trajectory(x, times)
    for i in range(B):
        alone = trajectory(x[i : i + 1], times[:, i])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            a = a[:, i : i + 1] if a.ndim == 5 else a[i : i + 1]
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@orders
def test_one_step_is_x0(order):
    trajectory = rollout(
        smooth(Flow(), drawn(1, (2, 2))), Flow(), drawn(0), [999.0, 0.0], solver=Orders(order)
    )
    np.testing.assert_allclose(trajectory.end, trajectory.prediction.x0[0], rtol=1e-6)


@orders
def test_detach_first_step(order):
    schedule, times = DDPM(), grid(DDPM())

    def trajectory(w, z, cut):
        # One matrix per step separates the gradients of the steps.
        def predict(x, t):
            step = jnp.argmin(jnp.abs(jnp.asarray(times[:-1]) - t))
            return smooth(schedule, w[step])(x, t)

        return rollout(predict, schedule, z, times, solver=Orders(order), detach_first_step=cut)

    def later(w, x, before):
        """Steps 2 to 4 alone, from the (constant) second state and, at order 2, first x0."""
        a, b, c = coefficients(schedule, times, Orders(order))
        for i in (1, 2, 3):
            x0 = smooth(schedule, w[i])(x, jnp.asarray(times[i])).x0
            x, before = a[i] * x + b[i] * x0 + c[i] * before, x0
        return (x * jnp.arange(2)).sum()

    def parts(w, z):
        actual = trajectory(w, z, True)
        return actual.prediction.x0[0].sum(), actual.x[1].sum(), actual.x[2].sum()

    def of_end(w, z, cut):
        return (trajectory(w, z, cut).end * jnp.arange(2)).sum()

    @jax.jit
    def everything(w, z):
        full = trajectory(w, z, False)
        return (
            (trajectory(w, z, True), full),
            [jax.grad(of_end, (0, 1))(w, z, cut) for cut in (True, False)],
            jax.grad(later)(w, full.x[1], full.prediction.x0[0]),
            jax.jacobian(parts)(w, z),
            tangent(lambda z: trajectory(w, z, True).end, z, z)[1],
        )

    with jax.enable_x64(True):
        actual = everything(drawn(1, (4, 2, 2), float), drawn(0, dtype=float))
        walks, gradients, expected, (first_gradient, second, third), pushed = jax.device_get(actual)
    for a, b in zip(*map(jax.tree.leaves, walks), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    (dw, dz), (dw_uncut, dz_uncut) = gradients
    assert np.all(dw[0] == 0) and np.all(dz == 0)
    assert np.all(dw_uncut[0] != 0) and np.all(dz_uncut != 0)
    np.testing.assert_allclose(dw[3], dw_uncut[3], rtol=1e-10)
    np.testing.assert_allclose(dw, expected, rtol=1e-10, atol=1e-14)
    # The first step's prediction keeps its gradient; the second state has none, and the
    # third one has the second step's.
    assert np.all(first_gradient[0] != 0) and np.all(first_gradient[1:] == 0)
    assert np.all(second == 0)
    assert np.all(third[1] != 0) and np.all(third[0] == 0)
    assert np.all(pushed == 0)


@pytest.mark.parametrize("schedule,order", [(DDPM(), 2), (Flow(), 1)], ids=["ddpm", "flow"])
def test_jvp_and_gradient_of_jvp_equal_central_differences(schedule, order):
    @jax.jit
    def pushed(w, z, v):
        def end(z):
            return rollout(
                smooth(schedule, w), schedule, z, grid(schedule), solver=Orders(order)
            ).end

        return tangent(end, z, v)

    @jax.jit
    def loss_and_slopes(w, z, v):
        return jax.value_and_grad(lambda w, z: (pushed(w, z, v)[1] ** 2).sum(), (0, 1))(w, z)

    def slope(f, point, direction, h=1e-5):
        return (f(point + h * direction) - f(point - h * direction)) / (2 * h)

    with jax.enable_x64(True):
        z, v, dz = (drawn(seed, dtype=float) for seed in (0, 2, 4))
        w, dw = (drawn(seed, (2, 2), float) for seed in (1, 3))
        actual, expected = pushed(w, z, v)[1], slope(lambda z: pushed(w, z, v)[0], z, v)
        assert float(jnp.abs(actual - expected).max()) < 1e-7 * float(jnp.abs(expected).max())
        by_w, by_z = loss_and_slopes(w, z, v)[1]
        expected = slope(lambda w: loss_and_slopes(w, z, v)[0], w, dw)
        assert float((by_w * dw).sum()) == pytest.approx(float(expected), rel=1e-7)
        expected = slope(lambda z: loss_and_slopes(w, z, v)[0], z, dz)
        assert float((by_z * dz).sum()) == pytest.approx(float(expected), rel=1e-7)


def errors(schedule, order, last_order, start, end, steps):
    """Largest error of the end point and of the Jacobian's diagonal after each number of steps."""
    rng = np.random.default_rng(0)
    mean, variance = rng.normal(size=(2, 2, 2)), rng.uniform(0.05, 2, size=(2, 2, 2))
    x = rng.normal(size=SHAPE)
    exact, slope = gaussian_map(schedule, mean, variance, x, start, end)
    predict = gaussian(schedule, jnp.asarray(mean), jnp.asarray(variance))
    actual = []
    for n in steps:
        # Uniform in log(alpha / sigma), the variable of these schemes' order.
        fine = np.linspace(start, end, 200_001)
        alpha, sigma = schedule.alpha_sigma(fine)
        lam = np.log(alpha / sigma)
        times = np.interp(np.linspace(lam[0], lam[-1], n + 1), lam, fine)

        def trajectory(x, times=times):
            orders = Orders(order, last_order)
            return rollout(predict, schedule, x, times, solver=orders).end

        reached, pushed = tangent(trajectory, jnp.asarray(x), jnp.ones(SHAPE))
        actual.append((np.abs(reached - exact).max(), np.abs(pushed - slope).max()))
    return np.array(actual)


@pytest.mark.parametrize(
    "schedule,order,last_order",
    [(DDPM(), 1, 1), (DDPM(), 2, 2), (DDPM(), 2, 1), (Flow(), 1, 1), (Flow(), 2, 2)],
)
def test_order_of_convergence_to_the_exact_ode_map(schedule, order, last_order):
    steps = np.array([80, 160])
    with jax.enable_x64(True):
        actual = errors(schedule, order, last_order, 950.0, 50.0, steps)
    slopes = -np.diff(np.log2(actual), axis=0)
    # One last step of order 1 costs O(h^2) once, so that the method stays of order 2.
    assert np.all(np.abs(slopes[-1] - order) < 0.15)
    assert np.all(actual[-1] < (2e-2 if order == 1 else 1e-3))


@all_schedules
def test_convergence_to_x0(schedule):
    """Uniform steps of t down to sigma = 0, as diffusers' grids are; there the last step of
    order 1, long in log(alpha / sigma), holds order 2 up."""
    x, mean, variance = np.random.default_rng(0).normal(size=SHAPE), 0.3, 0.5
    exact, _ = gaussian_map(schedule, mean, variance, x, 980.0, schedule.clean)
    gaps = {}
    with jax.enable_x64(True):
        predict = gaussian(schedule, mean, variance)
        for order in (1, 2):
            for n in (25, 100):
                times = np.linspace(980.0, schedule.clean, n + 1)
                end = rollout(predict, schedule, jnp.asarray(x), times, solver=Orders(order)).end
                gaps[order, n] = np.abs(end - exact).max()
    assert gaps[1, 100] < gaps[1, 25] / 3
    assert gaps[2, 100] < gaps[2, 25] / 1.5
    assert gaps[2, 25] < gaps[1, 25] / 2 and gaps[2, 100] < gaps[1, 100] / 3


def test_interpolated_times():
    start, end = jnp.array([899.0, 449.0, 10.0]), jnp.array([674.0, -1.0, 10.0])
    times = interpolate_times(start, end, 5)
    assert times.shape == (6, 3)
    np.testing.assert_array_equal(times[0], start)
    np.testing.assert_array_equal(times[-1], end)
    np.testing.assert_allclose(jnp.diff(times, axis=0)[:, 1], np.full(5, -90.0), rtol=1e-6)


@all_schedules
def test_fresh_noise_is_added_to_each_x0(schedule):
    """Against the steps written out; every sample on its own times, as a drawn step has them."""
    times = np.stack([grid(schedule)] * B, 1)
    times[1:-1, 1] -= 20
    alpha, sigma = (v[..., None, None, None] for v in schedule.alpha_sigma(times))
    with jax.enable_x64(True):
        predict, x = smooth(schedule, drawn(1, (2, 2), float)), drawn(0, dtype=float)
        noise = drawn(5, (4, *SHAPE), float)

        @jax.jit
        def walk(x):
            fresh = FreshNoise(lambda k: noise[k])
            return rollout(predict, schedule, x, jnp.asarray(times), solver=fresh)

        trajectory = walk(x)
        for i in range(4):
            np.testing.assert_allclose(trajectory.x[i], x, rtol=1e-12)
            x0 = predict(x, jnp.asarray(times[i])).x0
            x = alpha[i + 1] * x0 + sigma[i + 1] * noise[i]
        np.testing.assert_allclose(trajectory.end, x, rtol=1e-12)
        np.testing.assert_allclose(trajectory.end, trajectory.prediction.x0[-1], rtol=1e-12)
