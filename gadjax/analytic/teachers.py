"""Closed-form teachers: Gaussians and mixtures, whose posterior mean is a formula.

x_t = alpha x0 + sigma eps; the posterior E[x0 | x_t] and its eps are exact for Gaussians and their
mixtures, and so are the ODE map from noise to x0 and its Jacobian.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.errors import InputError
from gadjax.types import Prediction


def gaussian(mean, basis, variance, x_BD, alpha_B1, sigma_B1) -> Prediction:
    """Posterior mean for x0 ~ N(mean, basis diag(variance) basis^T).

    Args:
      mean: [D] or [B, D].
      basis: orthonormal columns [D, D].
      variance: along each column [D].
      x_BD: noised samples.
      alpha_B1: of the noise schedule.
      sigma_B1: of the noise schedule.
    """
    mean, basis, variance = (jnp.asarray(v, x_BD.dtype) for v in (mean, basis, variance))
    spread = alpha_B1**2 * variance + sigma_B1**2
    offset = (x_BD - alpha_B1 * mean) @ basis
    x0 = mean + (alpha_B1 * variance / spread * offset) @ basis.T
    return Prediction(x0, (sigma_B1 / spread * offset) @ basis.T)


def mixture(means, variances, logits, x_BD, alpha_B1, sigma_B1) -> Prediction:
    """Posterior mean for x0 ~ sum_k softmax(logits)_k N(means_k, variances_k I).

    Args:
      means: [K, D] or [B, K, D].
      variances: [K].
      logits: of the weights [K].
      x_BD: noised samples.
      alpha_B1: of the noise schedule.
      sigma_B1: of the noise schedule.
    """
    means, variances, logits = (jnp.asarray(v, x_BD.dtype) for v in (means, variances, logits))
    spread = (alpha_B1**2 * variances + sigma_B1**2)[..., None]
    offset = x_BD[:, None] - alpha_B1[..., None] * means
    logits = logits - 0.5 * jnp.sum(offset**2 / spread + jnp.log(spread), axis=-1)
    share = jax.nn.softmax(logits)[..., None]
    gain = alpha_B1[..., None] * variances[:, None] / spread
    x0 = jnp.sum(share * (means + gain * offset), axis=1)
    return Prediction(x0, jnp.sum(share * sigma_B1[..., None] / spread * offset, axis=1))


def gaussian_map(mean, basis, variance, x_BD, start, end):
    """Exact probability-flow ODE map of a Gaussian, with its Jacobians [B, D, D]. In float64.

    x(t) - alpha mean has the covariance
    M_t = alpha^2 S + sigma^2 at all times, and all M_t commute; so
    x(s) = alpha_s mean + M_s^(1/2) M_t^(-1/2) (x - alpha_t mean).

    Args:
      mean: [D].
      basis: orthonormal columns [D, D].
      variance: along each column [D].
      x_BD: states at the first time.
      start: (alpha_B1, sigma_B1) at the first time.
      end: (alpha_B1, sigma_B1) at the second time.
    """
    (a, s), (b, r) = start, end
    slope = np.sqrt((b**2 * variance + r**2) / (a**2 * variance + s**2))
    jacobian = np.einsum("ij,bj,kj->bik", basis, slope, basis)
    return b * mean + np.einsum("bij,bj->bi", jacobian, x_BD - a * mean), jacobian


def posterior_map(posterior: Callable[..., Prediction], x_BD, alpha: float, sigma: float, steps):
    """Probability-flow ODE map of any posterior to sigma = 0, by Runge-Kutta of order 4.

    Schedules differ in scale and pace alone: with (alpha, sigma) = r (cos h, sin h) and u = x / r
    the ODE is du/dh = cos h eps - sin h x0, which is smooth at both ends. Steps are even in h.

    Args:
      posterior: (x_BD, alpha_B1, sigma_B1) -> Prediction.
      x_BD: states at (alpha, sigma).
      alpha: at the start.
      sigma: at the start.
      steps: of the solver.
    """
    width = -np.arctan2(sigma, alpha) / steps

    def slope(u, h):
        cos, sin = (jnp.full((len(u), 1), f(h), u.dtype) for f in (jnp.cos, jnp.sin))
        prediction = posterior(u, cos, sin)
        return cos * prediction.eps - sin * prediction.x0

    def step(u, h):
        k1 = slope(u, h)
        k2 = slope(u + width / 2 * k1, h + width / 2)
        k3 = slope(u + width / 2 * k2, h + width / 2)
        k4 = slope(u + width * k3, h + width)
        return u + width / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    angles = jnp.asarray(-width * np.arange(steps, 0, -1), x_BD.dtype)
    return jax.lax.scan(step, x_BD / np.hypot(alpha, sigma), angles)[0]


def jacobians(f: Callable[[jax.Array], jax.Array], x_ND):
    """Values and exact Jacobians [N, D, D] of an f that maps every sample independently."""

    def along(axis):
        return jax.jvp(f, (x_ND,), (jnp.broadcast_to(axis, x_ND.shape),))

    value, columns = jax.vmap(along, out_axes=(None, -1))(jnp.eye(x_ND.shape[1], dtype=x_ND.dtype))
    return value, columns


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Gaussian teacher N(mean, basis diag(variance) basis^T), with a linear ODE map."""

    mean: np.ndarray
    basis: np.ndarray
    variance: np.ndarray

    @classmethod
    def random(cls, dim: int = 8, seed: int = 0) -> "Gaussian":
        """Gaussian with a mean of the data's scale and standard deviations from 0.3 to 1.4."""
        rng = np.random.default_rng(seed)
        basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        return cls(0.5 * rng.normal(size=dim), basis, np.geomspace(0.1, 2.0, dim))

    weights = np.ones(1)  # one component

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def total_variance(self) -> float:
        """Trace of the covariance."""
        return float(self.variance.sum())

    def posterior(self, x_BD, alpha_B1, sigma_B1) -> Prediction:
        return gaussian(self.mean, self.basis, self.variance, x_BD, alpha_B1, sigma_B1)

    def sample(self, key, count: int):
        deviation = jnp.sqrt(self.variance) * jax.random.normal(key, (count, self.dim))
        return self.mean + deviation @ self.basis.T

    def map(self, z_ND, alpha: float, sigma: float):
        """Exact ODE map of z from (alpha, sigma) to x0 [N, D], and its Jacobians [N, D, D].

        Args:
          z_ND: states at (alpha, sigma).
          alpha: of the noise schedule.
          sigma: of the noise schedule.
        """
        z_ND, one = np.asarray(z_ND, float), np.ones((len(z_ND), 1))
        start, end = (alpha * one, sigma * one), (one, 0 * one)
        return gaussian_map(self.mean, self.basis, self.variance, z_ND, start, end)

    def nearest(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Nearest component of every sample, as `Mixture.nearest`; a Gaussian is one component."""
        square_N = np.sum(((x_ND - self.mean) @ self.basis) ** 2 / self.variance, axis=1)
        return np.zeros(len(x_ND), int), square_N, self.dim


@dataclass(frozen=True, eq=False)
class Mixture:
    """Mixture teacher sum_k weights_k N(means_k, variances_k I)."""

    means: np.ndarray
    variances: np.ndarray
    weights: np.ndarray

    @classmethod
    def ring(cls, modes: int = 8, dim: int = 2, radius: float = 1.5, std: float = 0.25):
        """Mixture of equal components on a circle in the first two of `dim` dimensions.

        Args:
          modes: number of components.
          dim: dimensions.
          radius: of the circle.
          std: standard deviation of a component.
        Raises: InputError for fewer than two modes or dimensions.
        """
        if modes < 2 or dim < 2:
            raise InputError(
                f"bench: found a ring of {modes} in {dim} dim; expected 2 or more of both"
            )
        angle = 2 * np.pi * np.arange(modes) / modes
        means = np.zeros((modes, dim))
        means[:, :2] = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return cls(means, np.full(modes, std**2), np.full(modes, 1 / modes))

    @classmethod
    def random(
        cls, modes: int = 8, dim: int = 16, radius: float = 1.5, std: float = 0.3, seed: int = 0
    ):
        """Mixture of unequal components, about `radius` from 0 and sqrt(2) times that apart.

        Args:
          modes: number of components.
          dim: dimensions.
          radius: root mean square norm of a mean.
          std: standard deviation of a component.
          seed: of means and weights.
        """
        rng = np.random.default_rng(seed)
        weights = rng.uniform(0.5, 1.5, modes)
        means = radius / np.sqrt(dim) * rng.normal(size=(modes, dim))
        return cls(means, np.full(modes, std**2), weights / weights.sum())

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def mean(self) -> np.ndarray:
        return self.weights @ self.means

    @property
    def total_variance(self) -> float:
        """Trace of the covariance."""
        square = np.sum((self.means - self.mean) ** 2, axis=1)
        return float(self.weights @ (square + self.dim * self.variances))

    def posterior(self, x_BD, alpha_B1, sigma_B1) -> Prediction:
        logits = np.log(self.weights)
        return mixture(self.means, self.variances, logits, x_BD, alpha_B1, sigma_B1)

    def sample(self, key, count: int):
        component_key, noise_key = jax.random.split(key)
        k = jax.random.choice(
            component_key, len(self.weights), (count,), p=jnp.asarray(self.weights)
        )
        std = jnp.sqrt(jnp.asarray(self.variances))[k, None]
        return jnp.asarray(self.means)[k] + std * jax.random.normal(noise_key, (count, self.dim))

    def map(self, z_ND, alpha: float, sigma: float, steps: int = 128):
        """Exact ODE map and its Jacobians, as `Gaussian.map`, by Runge-Kutta in float64.

        Args:
          z_ND: states at (alpha, sigma).
          alpha: of the noise schedule.
          sigma: of the noise schedule.
          steps: of the solver.
        """
        with jax.enable_x64():
            ode = partial(posterior_map, self.posterior, alpha=alpha, sigma=sigma, steps=steps)
            return jax.device_get(jax.jit(partial(jacobians, ode))(jnp.asarray(z_ND, float)))

    def nearest(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Likeliest component of every sample, and its squared distance from that one's mean.

        Both are taken in the subspace that the means span: the variance of the other dimensions
        would hide a shift.
        Returns: indices [N], squared distances [N] in standard deviations, and the subspace's
          number of dimensions.
        """
        _, size, axes = np.linalg.svd(self.means - self.mean, full_matrices=False)
        axes = axes[size > 1e-9 * size.max()]
        square_NK = np.sum(((x_ND[:, None] - self.means) @ axes.T) ** 2, axis=-1) / self.variances
        score_NK = np.log(self.weights) - 0.5 * (square_NK + len(axes) * np.log(self.variances))
        which_N = np.argmax(score_NK, axis=1)
        return which_N, np.take_along_axis(square_NK, which_N[:, None], axis=1)[:, 0], len(axes)
