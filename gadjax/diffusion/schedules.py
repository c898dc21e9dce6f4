"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, with t in the network's own units.

DDPM and Flow span a thousand units, TrigFlow pi / 2 (an angle). `clean` is the time at which x_t =
x0: -1 for DDPM, whose time 0 has the first noise already, and 0 for the others. Losses draw
timesteps `spacing` apart, from clean + spacing to `last`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.errors import InputError
from gadjax.types import expand


class NoiseSchedule(Protocol):
    """Noise schedule; `clean`, `last` and `spacing` are timesteps (see the module's docstring)."""

    clean: float
    last: float
    spacing: float

    def alpha_sigma(self, t):
        """Signal and noise levels (alpha, sigma) at times t of any shape; NumPy in, float64 NumPy
        out; else JAX."""


@dataclass(frozen=True)
class DDPM:
    """Variance-preserving schedule of DDPM (Ho et al. 2020), as diffusers tabulates it.

    The table is rounded to float32 where diffusers rounds it, since the networks were trained with
    that; alpha and sigma are computed from it in float64 and interpolated linearly between integer
    timesteps.

    Args:
      beta_start, beta_end: the first and the last beta.
      beta_schedule: "linear" or "scaled_linear" (linear in sqrt(beta)).
      steps: number of timesteps.
      clean, spacing: as in the module's docstring.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    steps: int = 1000
    clean: float = -1.0
    spacing: float = 1.0

    @property
    def last(self) -> float:
        return self.steps - 1.0

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Tables of alpha and sigma at times -1, 0, ..., steps - 1, in float64."""
        if self.beta_schedule == "linear":
            beta = np.linspace(self.beta_start, self.beta_end, self.steps, dtype=np.float32)
        elif self.beta_schedule == "scaled_linear":
            ends = self.beta_start**0.5, self.beta_end**0.5
            beta = np.linspace(*ends, self.steps, dtype=np.float32) ** 2
        else:
            raise InputError(
                f"beta_schedule: found {self.beta_schedule!r}; expected 'linear' or 'scaled_linear'"
            )
        # torch multiplies float32 factors up in float64 and rounds the products; a product in
        # float32 would put sigma wrong by 4e-5 of itself near time 0.
        bar = np.cumprod(np.float32(1) - beta, dtype=np.float64).astype(np.float32)
        bar = np.concatenate([[1.0], bar.astype(np.float64)])
        return np.sqrt(bar), np.sqrt(1 - bar)

    def alpha_sigma(self, t):
        if isinstance(t, jax.Array):
            t = _float(t)
            position = jnp.clip(t - self.clean, 0, self.steps)
            low = jnp.minimum(jnp.floor(position), self.steps - 1)
            fraction = position - low
            low = low.astype(jnp.int32)

            def interpolate(table):
                table = jnp.asarray(table, t.dtype)
                return table[low] * (1 - fraction) + table[low + 1] * fraction

            return tuple(interpolate(table) for table in self.table)
        nodes = np.arange(self.steps + 1) + self.clean
        return tuple(np.interp(np.asarray(t, np.float64), nodes, table) for table in self.table)


@dataclass(frozen=True)
class Flow:
    """Straight-line schedule of rectified flow (Liu et al. 2022): sigma = t / steps."""

    steps: int = 1000
    clean: float = 0.0
    spacing: float = 1.0

    @property
    def last(self) -> float:
        return float(self.steps)

    def alpha_sigma(self, t):
        sigma = (_float(t) if isinstance(t, jax.Array) else np.asarray(t, np.float64)) / self.steps
        return 1 - sigma, sigma


@dataclass(frozen=True)
class TrigFlow:
    """Trigonometric schedule of sCM (Lu & Song, arXiv:2410.11081): alpha = cos t, sigma = sin t.

    Latents have unit variance here: those of diffusers are larger by its sigma_data.
    """

    clean: float = 0.0
    last: float = 1.57080  # as SanaSprintPipeline rounds it
    spacing: float = 1.57080 / 1000

    def alpha_sigma(self, t):
        if isinstance(t, jax.Array):
            return jnp.cos(_float(t)), jnp.sin(_float(t))
        t = np.asarray(t, np.float64)
        return np.cos(t), np.sin(t)


def _float(t: jax.Array) -> jax.Array:
    """Cast integer and half-precision times to float32; float64 stays."""
    return t.astype(jnp.promote_types(t.dtype, jnp.float32))


def shift_time(t, shift: float, steps: int = 1000):
    """Resolution-dependent timestep shift of SD3 (Esser et al. 2024, section 5.3.2).

    Args:
      t: times of a flow, 0 to steps.
      shift: factor on the noise-to-signal ratio sigma / alpha; 1 changes nothing.
      steps: number of timesteps.
    """
    sigma = t / steps
    return steps * shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(schedule: NoiseSchedule, x0_BHWC, eps_BHWC, t_B):
    """Forward process: x_t = alpha x0 + sigma eps.

    Args:
      schedule: noise schedule.
      x0_BHWC, eps_BHWC: clean latents and standard normal noise.
      t_B: times, [B] or a scalar.
    """
    alpha, sigma = schedule.alpha_sigma(t_B)
    return expand(alpha, x0_BHWC) * x0_BHWC + expand(sigma, x0_BHWC) * eps_BHWC


def renoise(schedule: NoiseSchedule, x_s_BHWC, s_B, t_B, eps_BHWC):
    """Forward process from time s to a noisier time t with fresh noise.

    x_t = (alpha_t / alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t sigma_s / alpha_s)^2) eps.

    Args:
      schedule: noise schedule of both times.
      x_s_BHWC: latents at time s.
      s_B, t_B: times, [B] or scalars, s <= t.
      eps_BHWC: standard normal noise, independent of x_s.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.alpha_sigma(s_B), schedule.alpha_sigma(t_B)
    ratio = alpha_t / alpha_s
    noise_scale = jnp.sqrt(jnp.maximum(sigma_t**2 - (ratio * sigma_s) ** 2, 0))
    return expand(ratio, x_s_BHWC) * x_s_BHWC + expand(noise_scale, x_s_BHWC) * eps_BHWC
