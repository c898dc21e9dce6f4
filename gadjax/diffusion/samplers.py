"""A scheduler's steps as one thing: its times, and the walk over them.

Most walks are gadjax.diffusion.rollout's. Here are those of diffusers' schedulers that are not:
several steps at once in PNDM, and steps that add new noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.diffusion.rollout import rollout
from gadjax.diffusion.schedules import DDPM, NoiseSchedule
from gadjax.errors import InputError
from gadjax.seeds import PRNG_IMPL
from gadjax.types import Prediction


@dataclass(frozen=True)
class Sampler:
    """How one scheduler walks from noise to a picture.

    grid: number of steps n -> times [n + 1] as diffusers sets them, in the schedule's units.
    order, last_order: as gadjax.diffusion.rollout.rollout takes them.
    takes_timesteps: whether diffusers lets others than the grid's be chosen.
    walk: (predict, schedule, z_BHWC, times) -> end where it is none of gadjax.diffusion.rollout's.
    extra: network evaluations beside one a step. renoises: whether steps add new noise.
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
        """The times [n + 1] of a walk of n steps, float64, the noisiest first.

        timesteps: the n times to start a step from, taken as they are (no shift); the walk then
          ends at `schedule.clean`, as one with diffusers' `timesteps=` does. Where diffusers takes
          none they must be those of the grid, to within 0.01, and the grid's are returned.
        Raises InputError unless exactly one of the two is given, and for times that do not fall,
        that the schedule lacks or that diffusers cannot take.
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
        if not self._walkable(times):
            raise InputError(
                f"{flag}: found {given}; expected one or more "
                + ("times in falling order" if flag == "timesteps" else "steps of their own times")
                + f", above {self.schedule.clean:g} and up to {self.schedule.last:g}"
                + (", whole numbers" if isinstance(self.schedule, DDPM) else "")
            )
        return times if timesteps is None or self.takes_timesteps else self._on_grid(times)

    def _on_grid(self, times: np.ndarray) -> np.ndarray:
        grid = self.grid(len(times) - 1)
        if np.abs(grid - times).max() > 0.01:
            raise InputError(
                f"timesteps: found {_listed(times)}; expected {_listed(grid)}, the grid of "
                f"{len(times) - 1} of the scheduler's steps, because diffusers takes no other"
            )
        return grid

    def _walkable(self, times: np.ndarray) -> bool:
        starts = times[:-1]
        return (
            len(starts) > 0
            and bool(np.all(np.diff(starts) < 0))
            # A DDIM walk may stand still at its end: from time 0 to alpha_bar[0], which is time 0.
            and times[-1] <= starts[-1]
            and self.schedule.clean < starts[-1]
            and starts[0] <= self.schedule.last
            and (not isinstance(self.schedule, DDPM) or bool(np.all(times == np.round(times))))
        )


def _listed(times: np.ndarray) -> str:
    return ", ".join(f"{time:.2f}".rstrip("0").rstrip(".") for time in times[:-1])


def sample(
    predict: Callable[[jax.Array, jax.Array], Prediction], sampler: Sampler, z_BHWC, times
) -> jax.Array:
    """Where the walk over `times` from z_BHWC ends.

    predict, times: as gadjax.diffusion.rollout.rollout takes them.
    """
    if sampler.sample_fn is not None:
        return sampler.sample_fn(predict, sampler.schedule, z_BHWC, times)
    orders = {"order": sampler.order, "last_order": sampler.last_order}
    return rollout(predict, sampler.schedule, z_BHWC, times, **orders).end


Predict = Callable[[jax.Array, jax.Array], Prediction]

# Adams and Bashforth's weights of the newest and the three noises before it.
MULTISTEP = np.array([[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0]])
FOURTH = np.array([[55, -59, 37, -9]]) / 24


def plms(predict: Predict, schedule: NoiseSchedule, x_BHWC: jax.Array, times) -> jax.Array:
    """Where n steps of PNDM end that skip its Runge-Kutta part (Liu et al., arXiv:2202.09778).

    times: [n + 1]. Costs n + 1 evaluations, as the first step is taken twice: first to see the
    noise at its end, then with the mean of both noises. One step is DDIM's.
    """
    alpha, sigma = (jnp.asarray(v, x_BHWC.dtype) for v in schedule.alpha_sigma(np.asarray(times)))
    times = jnp.asarray(times, x_BHWC.dtype)
    count = len(times) - 1

    def moved(x, eps, k, to):
        """DDIM's step with the noise that is told."""
        return (alpha[to] / alpha[k]) * (x - sigma[k] * eps) + sigma[to] * eps

    first = predict(x_BHWC, times[0]).eps
    x = moved(x_BHWC, first, 0, 1)
    if count == 1:
        return x
    x = moved(x_BHWC, (first + predict(x, times[1]).eps) / 2, 0, 1)
    weights = np.concatenate([MULTISTEP, np.repeat(FOURTH, max(count - 3, 0), axis=0)])[1:count]
    history = jnp.stack([first, jnp.zeros_like(first), jnp.zeros_like(first)])

    def step(carry, now):
        x, history = carry
        k, weight = now
        history = jnp.concatenate([predict(x, times[k]).eps[None], history])
        x = moved(x, jnp.tensordot(weight, history, 1), k, k + 1)
        return (x, history[:3]), None

    rows = jnp.arange(1, count), jnp.asarray(weights, x.dtype)
    return jax.lax.scan(step, (x, history), rows)[0][0]


def consistency(
    predict: Predict, schedule: NoiseSchedule, x_BHWC: jax.Array, times, *, scaling: float = 0.0
) -> jax.Array:
    """Where steps end that each go to x0 and from there, with new noise, to the next time.

    Consistency models' multistep sampling (Song et al., arXiv:2303.01469, algorithm 1).
    scaling: of LCM's boundary condition (Luo et al., arXiv:2310.04378), c_skip = 1 / (4 s^2 + 1)
      at s = scaling t, which mixes a little of x into x0; 0 leaves it out.
    The new noise of a sample is drawn from its own x_BHWC's bits, so that a picture stays a
    function of the noise it starts from. Derivatives hold it fixed.
    """
    keys = keys_from_noise(x_BHWC)
    for k, (t, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x0 = predict(x_BHWC, jnp.asarray(t, x_BHWC.dtype)).x0
        if scaling:
            square = float(2 * scaling * t) ** 2
            x0 = (square / (square + 1)) ** 0.5 * x0 + x_BHWC / (square + 1)
        if k == len(times) - 2:
            return x0
        alpha, sigma = schedule.alpha_sigma(np.asarray(after))
        x_BHWC = float(alpha) * x0 + float(sigma) * step_noise(keys, k, x_BHWC)


def keys_from_noise(x_BHWC: jax.Array) -> jax.Array:
    """A key for each sample, made of its bits."""
    flat = jax.lax.stop_gradient(x_BHWC).astype(jnp.float32).reshape(len(x_BHWC), -1)
    bits = jax.lax.bitcast_convert_type(flat, jnp.uint32)
    odd = 2 * jnp.arange(bits.shape[1], dtype=jnp.uint32) + 1
    key = partial(jax.random.key, impl=PRNG_IMPL)
    return jax.vmap(key)(jnp.sum(bits * odd, axis=1, dtype=jnp.uint32))


def step_noise(keys_B: jax.Array, step: int, x_BHWC: jax.Array) -> jax.Array:
    """The noise that step number `step` adds."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B)
    draw = jax.vmap(lambda key: jax.random.normal(key, x_BHWC.shape[1:], jnp.float32))
    return draw(keys).astype(x_BHWC.dtype)
