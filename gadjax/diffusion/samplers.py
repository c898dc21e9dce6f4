"""Samplers: a scheduler's timesteps and the method that integrates over them.

Most samplers are linear ODE steps (gadjax.diffusion.rollout). The others of diffusers' schedulers
are here: PNDM, a multistep method, consistency sampling, which adds fresh noise, and TCD, which
adds a share of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.diffusion.rollout import FreshNoise, Orders, rollout
from gadjax.diffusion.schedules import DDPM, NoiseSchedule
from gadjax.errors import InputError
from gadjax.seeds import PRNG_IMPL
from gadjax.types import Prediction


@dataclass(frozen=True)
class Sampler:
    """Sampler of one diffusers scheduler.

    Args:
      schedule: noise schedule.
      grid: number of steps n -> times [n + 1] as diffusers sets them, in the schedule's units.
      order, last_order: as in gadjax.diffusion.rollout.Orders.
      takes_timesteps: diffusers accepts timesteps other than the grid's.
      sample_fn: (predict, schedule, z_BHWC, times) -> final latents; None: rollout.
      extra_evaluations: network evaluations in addition to one a step.
      stochastic: steps add fresh noise.
    """

    schedule: NoiseSchedule
    grid: Callable[[int], np.ndarray]
    order: int = 1
    last_order: int = 1
    takes_timesteps: bool = True
    sample_fn: Callable[..., jax.Array] | None = None
    extra_evaluations: int = 0
    stochastic: bool = False

    def times(
        self, steps: int | None = None, timesteps: Sequence[float] | None = None
    ) -> np.ndarray:
        """Times [n + 1] of a trajectory of n steps, float64, the noisiest first.

        Args:
          steps: number of steps n, on the scheduler's grid.
          timesteps: n explicit timesteps, without shift; the trajectory then ends at
            `schedule.clean`, as with diffusers' `timesteps=`. Where diffusers accepts none they
            must be those of the grid, to within 0.01, and the grid's are returned.

        Raises: InputError unless exactly one of the two is given, and for times that do not
          decrease, lie outside the schedule or are refused by diffusers.
        """
        if (steps is None) == (timesteps is None):
            raise InputError(
                f"steps, timesteps: found {steps} and {timesteps}; expected exactly one of them"
            )
        if timesteps is not None:
            flag, given = "timesteps", list(timesteps)
            times = np.array([*given, self.schedule.clean], np.float64)
        else:
            flag, given = "steps", steps
            times = self.grid(steps) if steps >= 1 else np.empty(0)
        if not self._is_valid(times):
            raise InputError(
                f"{flag}: found {given}; expected one or more "
                + ("times in falling order" if flag == "timesteps" else "steps of distinct times")
                + f", above {self.schedule.clean:g} and up to {self.schedule.last:g}"
                + (", whole numbers" if isinstance(self.schedule, DDPM) else "")
            )
        return times if timesteps is None or self.takes_timesteps else self._on_grid(times)

    def _on_grid(self, times: np.ndarray) -> np.ndarray:
        grid = self.grid(len(times) - 1)
        if np.abs(grid - times).max() > 0.01:
            raise InputError(
                f"timesteps: found {_format_times(times)}; expected {_format_times(grid)}, the "
                f"grid of {len(times) - 1} of the scheduler's steps, as diffusers takes no other"
            )
        return grid

    def _is_valid(self, times: np.ndarray) -> bool:
        starts = times[:-1]
        return (
            len(starts) > 0
            and bool(np.all(np.diff(starts) < 0))
            # The last DDIM step may be empty: from time 0 to alpha_bar[0], which is time 0.
            and times[-1] <= starts[-1]
            and self.schedule.clean < starts[-1]
            and starts[0] <= self.schedule.last
            and (not isinstance(self.schedule, DDPM) or bool(np.all(times == np.round(times))))
        )


def _format_times(times: np.ndarray) -> str:
    return ", ".join(f"{time:.2f}".rstrip("0").rstrip(".") for time in times[:-1])


def sample(
    predict: Callable[[jax.Array, jax.Array], Prediction], sampler: Sampler, z_BHWC, times
) -> jax.Array:
    """Sample: latents at the end of the sampler's trajectory from noise z_BHWC.

    Args:
      predict, times: as for gadjax.diffusion.rollout.rollout.
      sampler: of the schedule that `predict` uses.
      z_BHWC: initial noise.
    """
    if sampler.sample_fn is not None:
        return sampler.sample_fn(predict, sampler.schedule, z_BHWC, times)
    orders = Orders(sampler.order, sampler.last_order)
    return rollout(predict, sampler.schedule, z_BHWC, times, solver=orders).end


Predict = Callable[[jax.Array, jax.Array], Prediction]

# Adams-Bashforth weights of the newest eps and of the three before it: orders 1 to 3, then 4.
AB_WARMUP = np.array([[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0]])
AB4 = np.array([[55, -59, 37, -9]]) / 24


def plms(predict: Predict, schedule: NoiseSchedule, x_BHWC: jax.Array, times) -> jax.Array:
    """PLMS, which is PNDM without its Runge-Kutta steps (Liu et al., arXiv:2202.09778).

    Costs n + 1 evaluations, as the first step is taken twice: first to predict eps at its end, then
    with the mean of both eps. A single step is DDIM's.

    Args:
      predict, schedule: as for gadjax.diffusion.rollout.rollout.
      x_BHWC: noise at times[0].
      times: [n + 1].

    Returns: latents at times[n].
    """
    alpha, sigma = (jnp.asarray(v, x_BHWC.dtype) for v in schedule.alpha_sigma(np.asarray(times)))
    times = jnp.asarray(times, x_BHWC.dtype)
    count = len(times) - 1

    def ddim_step(x, eps, k, to):
        """DDIM step from time k to time `to` with the given eps."""
        return (alpha[to] / alpha[k]) * (x - sigma[k] * eps) + sigma[to] * eps

    first = predict(x_BHWC, times[0]).eps
    x = ddim_step(x_BHWC, first, 0, 1)
    if count == 1:
        return x
    x = ddim_step(x_BHWC, (first + predict(x, times[1]).eps) / 2, 0, 1)
    weights = np.concatenate([AB_WARMUP, np.repeat(AB4, max(count - 3, 0), axis=0)])[1:count]
    history = jnp.stack([first, jnp.zeros_like(first), jnp.zeros_like(first)])

    def step(carry, inputs):
        x, history = carry
        k, weight = inputs
        history = jnp.concatenate([predict(x, times[k]).eps[None], history])
        x = ddim_step(x, jnp.tensordot(weight, history, 1), k, k + 1)
        return (x, history[:3]), None

    rows = jnp.arange(1, count), jnp.asarray(weights, x.dtype)
    return jax.lax.scan(step, (x, history), rows)[0][0]


def consistency(
    predict: Predict, schedule: NoiseSchedule, x_BHWC: jax.Array, times, *, scaling: float = 0.0
) -> jax.Array:
    """Multistep consistency sampling (Song et al., arXiv:2303.01469, algorithm 1).

    Each step predicts x0 and adds fresh noise to it for the next time. The noise of a sample is
    seeded by the bits of its own x_BHWC, so that an image stays a function of its initial noise;
    derivatives hold it fixed.

    Args:
      predict, schedule: as for gadjax.diffusion.rollout.rollout.
      x_BHWC: noise at times[0].
      times: [n + 1].
      scaling: timestep scaling of LCM's boundary condition (Luo et al., arXiv:2310.04378), c_skip =
        1 / (4 s^2 + 1) at s = scaling t, which mixes a little of x into x0; 0 disables it.

    Returns: the last step's x0.
    """

    def bounded(x, t):
        prediction, square = predict(x, t), (2 * scaling * t) ** 2
        x0 = jnp.sqrt(square / (square + 1)) * prediction.x0 + x / (square + 1)
        return prediction._replace(x0=x0)

    x0_of = bounded if scaling else predict
    return rollout(x0_of, schedule, x_BHWC, times, solver=fresh_noise(x_BHWC)).end


def tcd(
    predict: Predict, schedule: DDPM, x_BHWC: jax.Array, times, *, eta: float = 0.0
) -> jax.Array:
    """Strategic stochastic sampling of TCD (Zheng et al., arXiv:2402.19159, algorithm 2).

    The step from t to t' predicts the latent at s = floor((1 - eta) t') and adds fresh noise from
    there to t'. The last one ends at time 0, whose noise is left, without fresh noise. The noise of
    a sample is that of `consistency`. eta, which the paper calls gamma: 0 is DDIM's step, 1 starts
    from time 0.

    Args:
      predict, schedule: as for gadjax.diffusion.rollout.rollout.
      x_BHWC: noise at times[0].
      times: [n + 1].
      eta: share of fresh noise, from 0 to 1.

    Returns: latents at time 0.
    """
    ends = np.append(np.asarray(times)[1:-1], 0)
    between = np.floor(np.float32(1 - eta) * np.float32(ends))  # in float32, as in torch
    (alpha, sigma), (alpha_end, _) = map(schedule.alpha_sigma, (between, ends))
    ratio = alpha_end / alpha
    spread = np.sqrt(np.maximum(1 - ratio**2, 0))
    keys = keys_from_noise(x_BHWC)

    def step(x, inputs):
        k, t, of_x0, of_eps, of_noise = inputs
        prediction = predict(x, t)
        x = of_x0 * prediction.x0 + of_eps * prediction.eps
        return x + of_noise * step_noise(keys, k, x), None

    rows = (np.asarray(v, x_BHWC.dtype) for v in (times[:-1], alpha_end, ratio * sigma, spread))
    return jax.lax.scan(step, x_BHWC, (jnp.arange(len(ends)), *map(jnp.asarray, rows)))[0]


def fresh_noise(z_BHWC: jax.Array) -> FreshNoise:
    """Fresh noise of consistency sampling, seeded by the bits of the initial noise.

    z_BHWC: initial noise.
    """
    keys = keys_from_noise(z_BHWC)
    return FreshNoise(lambda step: step_noise(keys, step, z_BHWC))


def fixed_noise(z_BHWC: jax.Array) -> FreshNoise:
    """The initial noise again after each step, in the place of fresh noise (SiD's "fixed")."""
    return FreshNoise(lambda step: z_BHWC)


def same_noise(predict: Predict, schedule: NoiseSchedule, x_BHWC: jax.Array, times) -> jax.Array:
    """Sampling in which the initial noise is added to each predicted x0, for the next time.

    Args:
      predict, schedule: as for gadjax.diffusion.rollout.rollout.
      x_BHWC: noise at times[0].
      times: [n + 1].
    """
    return rollout(predict, schedule, x_BHWC, times, solver=fixed_noise(x_BHWC)).end


def keys_from_noise(x_BHWC: jax.Array) -> jax.Array:
    """PRNG keys [B], one for each sample, from the bits of its noise."""
    flat = jax.lax.stop_gradient(x_BHWC).astype(jnp.float32).reshape(len(x_BHWC), -1)
    bits = jax.lax.bitcast_convert_type(flat, jnp.uint32)
    odd = 2 * jnp.arange(bits.shape[1], dtype=jnp.uint32) + 1
    key = partial(jax.random.key, impl=PRNG_IMPL)
    return jax.vmap(key)(jnp.sum(bits * odd, axis=1, dtype=jnp.uint32))


def step_noise(keys_B: jax.Array, step: int | jax.Array, x_BHWC: jax.Array) -> jax.Array:
    """Fresh standard normal noise of one step.

    Args:
      keys_B: of `keys_from_noise`.
      step: number of the step, a scalar or [B].
      x_BHWC: gives the shape and dtype.
    """
    keys = jax.vmap(jax.random.fold_in)(keys_B, jnp.broadcast_to(step, keys_B.shape))
    draw = jax.vmap(lambda key: jax.random.normal(key, x_BHWC.shape[1:], jnp.float32))
    return draw(keys).astype(x_BHWC.dtype)
