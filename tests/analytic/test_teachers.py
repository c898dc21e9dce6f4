import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import exact_map

from gadjax.analytic import Gaussian, Mixture
from gadjax.analytic.teachers import jacobians, posterior_map
from gadjax.diffusion.schedules import DDPM, Flow
from gadjax.errors import InputError

UNEVEN = Mixture(
    means=np.array([[1.0, 0.5], [-0.8, 0.2], [0.1, -1.2]]),
    variances=np.array([0.05, 0.2, 0.1]),
    weights=np.array([0.2, 0.5, 0.3]),
)
RNG = np.random.default_rng(0)
ends = pytest.mark.parametrize("alpha,sigma", [(0.0, 1.0), (0.3, 0.95), (0.8, 0.2), (1.0, 0.0)])


def posterior64(teacher, x, alpha, sigma):
    """The posterior in float64."""
    with jax.enable_x64():
        full = (jnp.full((len(x), 1), v, float) for v in (alpha, sigma))
        return jax.device_get(teacher.posterior(jnp.asarray(x, float), *full))


@ends
def test_a_gaussians_posterior_is_linear_regression(alpha, sigma):
    """x0 = m + alpha S C^-1 (x - alpha m) with C = alpha^2 S + sigma^2."""
    teacher, x = Gaussian.random(5, seed=3), RNG.normal(size=(7, 5))
    prediction = posterior64(teacher, x, alpha, sigma)
    cov = teacher.basis @ np.diag(teacher.variance) @ teacher.basis.T
    solution = np.linalg.solve(alpha**2 * cov + sigma**2 * np.eye(5), (x - alpha * teacher.mean).T)
    np.testing.assert_allclose(prediction.x0, teacher.mean + alpha * (cov @ solution).T, rtol=1e-10)
    np.testing.assert_allclose(prediction.eps, sigma * solution.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alpha,sigma", [(0.0, 1.0), (0.3, 0.95), (0.8, 0.2)])
def test_a_mixtures_posterior_is_the_mean_under_bayes_rule(alpha, sigma):
    """Summed over a fine grid of x0: p(x0 | x) ~ p(x0) N(x; alpha x0, sigma^2)."""
    x = RNG.normal(size=(4, 2))
    prediction = posterior64(UNEVEN, x, alpha, sigma)
    axis = np.linspace(-4, 4, 801)
    x0 = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 1, 2)
    square = np.sum((x0 - UNEVEN.means) ** 2, axis=-1) / UNEVEN.variances
    density = np.sum(UNEVEN.weights / UNEVEN.variances * np.exp(-0.5 * square), axis=1)
    for i in range(len(x)):
        reach = np.sum((x[i] - alpha * x0[:, 0]) ** 2, axis=1) / sigma**2
        share = density * np.exp(-0.5 * reach)
        mean = share @ x0[:, 0] / share.sum()
        np.testing.assert_allclose(prediction.x0[i], mean, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(
            prediction.eps[i], (x[i] - alpha * mean) / sigma, rtol=1e-8, atol=1e-9
        )


@pytest.mark.parametrize("schedule", [Flow(), DDPM()], ids=["flow", "ddpm"])
def test_a_gaussians_map_is_its_ode(schedule):
    """The formula against a fine ODE solution, in another schedule's time than its own, and its
    Jacobian against jacfwd of that solution."""
    teacher, z = Gaussian.random(4), RNG.normal(size=(6, 4))
    alpha, sigma = (float(v) for v in schedule.alpha_sigma(schedule.last))
    value, jacobian = teacher.map(z, alpha, sigma)
    with jax.enable_x64():

        def solve(z):
            return posterior_map(teacher.posterior, z[None], alpha, sigma, 400)[0]

        end, found = jax.jit(jax.vmap(lambda z: (solve(z), jax.jacfwd(solve)(z))))(jnp.asarray(z))
    np.testing.assert_allclose(end, value, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found, jacobian, rtol=1e-8, atol=1e-8)


def test_a_mixtures_map_solves_the_schedules_ode():
    """Against an ODE solution in DDPM's time, one unit a step, and its central differences."""
    schedule, z, h = DDPM(), RNG.normal(size=(8, 2)), 1e-5
    alpha, sigma = (float(v) for v in schedule.alpha_sigma(999.0))
    value, jacobian = UNEVEN.map(z, alpha, sigma)
    with jax.enable_x64():

        def predict(x, t):
            given = (jnp.broadcast_to(v, (len(x), 1)) for v in schedule.alpha_sigma(t))
            return UNEVEN.posterior(x, *given)

        solve = jax.jit(lambda x: exact_map(predict, schedule, x, 999, -1))
        moves = np.concatenate([np.zeros((1, 2)), h * np.eye(2), -h * np.eye(2)])
        ends = np.asarray(solve(jnp.asarray((z[:, None] + moves).reshape(-1, 2))))
    ends = ends.reshape(8, 5, 2)
    np.testing.assert_allclose(value, ends[:, 0], atol=2e-6)
    slopes = np.swapaxes(ends[:, 1:3] - ends[:, 3:], 1, 2) / (2 * h)
    np.testing.assert_allclose(jacobian, slopes, atol=2e-5 * np.abs(slopes).max())


def test_jacobians_have_the_outputs_first():
    matrix = RNG.normal(size=(3, 3)).astype(np.float32)
    x = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
    value, found = jacobians(lambda x: jnp.sin(x @ matrix.T), x)
    shifted = np.asarray(x) @ matrix.T
    np.testing.assert_allclose(value, np.sin(shifted), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, np.cos(shifted)[:, :, None] * matrix, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("teacher", [Gaussian.random(3), UNEVEN, Mixture.random(5, 3)])
def test_samples_have_the_teachers_moments(teacher):
    count = 40_000
    x = np.asarray(teacher.sample(jax.random.key(0), count), float)
    assert x.shape == (count, teacher.dim)
    error = 5 * np.sqrt(teacher.total_variance / count)
    np.testing.assert_allclose(x.mean(0), teacher.mean, atol=error)
    assert np.trace(np.cov(x.T)) == pytest.approx(teacher.total_variance, rel=0.03)


@pytest.mark.parametrize("dim", [2, 64])
def test_samples_belong_to_their_nearest_component(dim):
    teacher = Mixture.ring(8, dim)
    x = np.asarray(teacher.sample(jax.random.key(1), 8000), float)
    which, square, inner = teacher.nearest(x)
    # The ring spans two dimensions, and in these it is judged.
    assert inner == 2 and np.mean(square) == pytest.approx(2, rel=0.05)
    expected = np.argmin(np.sum((x[:, None, :2] - teacher.means[:, :2]) ** 2, -1), axis=1)
    np.testing.assert_array_equal(which, expected)
    shifted = teacher.means + 0.5 * np.eye(dim)[0]
    np.testing.assert_allclose(teacher.nearest(shifted)[1], 4)  # 0.5 is two standard deviations
    assert np.mean(teacher.nearest(0.3 * x)[1]) > 16


def test_a_gaussian_is_one_component():
    teacher = Gaussian.random(6)
    x = np.asarray(teacher.sample(jax.random.key(1), 4000), float)
    which, square, inner = teacher.nearest(teacher.mean + 2 * (x - teacher.mean))
    assert not which.any() and inner == 6 and teacher.weights.tolist() == [1]
    assert np.mean(square) == pytest.approx(4 * 6, rel=0.05)


def test_a_ring_is_a_ring():
    teacher = Mixture.ring(modes=6, dim=3, radius=2.0, std=0.5)
    np.testing.assert_allclose(np.linalg.norm(teacher.means, axis=1), 2)
    np.testing.assert_allclose(teacher.means[:, 2], 0)
    assert teacher.dim == 3 and teacher.total_variance == pytest.approx(4 + 3 * 0.25)
    with pytest.raises(InputError, match="bench: found a ring of 6 in 1 dim"):
        Mixture.ring(6, dim=1)
