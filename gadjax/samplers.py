"""A scheduler's steps as one thing: its times, and the walk over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from gadjax.errors import InputError
from gadjax.rollout import rollout
from gadjax.schedules import DDPM, NoiseSchedule
from gadjax.types import Prediction


@dataclass(frozen=True)
class Sampler:
    """How one scheduler walks from noise to a picture.

    grid: number of steps n -> times [n + 1] as diffusers sets them, in the schedule's units.
    order, last_order: as gadjax.rollout.rollout takes them.
    takes_timesteps: whether diffusers lets others than the grid's be chosen.
    walk: (predict, schedule, z_BHWC, times) -> end where it is none of gadjax.rollout's.
    extra: network evaluations beside one a step. renoises: whether steps add new noise.
    """

    schedule: NoiseSchedule
    grid: Callable[[int], np.ndarray]
    order: int = 1
    last_order: int = 1
    takes_timesteps: bool = True
    walk: Callable[..., jax.Array] | None = None
    extra: int = 0
    renoises: bool = False

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

    predict, times: as gadjax.rollout.rollout takes them.
    """
    if sampler.walk is not None:
        return sampler.walk(predict, sampler.schedule, z_BHWC, times)
    orders = {"order": sampler.order, "last_order": sampler.last_order}
    return rollout(predict, sampler.schedule, z_BHWC, times, **orders).end
