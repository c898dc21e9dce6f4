"""Time laws: the distributions from which losses draw their timesteps."""

from math import inf, log
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.diffusion.schedules import Flow, NoiseSchedule, shift_time
from gadjax.errors import InputError, check_choice
from gadjax.objectives.base import Context

TIMES = "uniform", "shifted", "logit_normal"
LOGIT_MEAN, LOGIT_STD = log(2), 1.6  # SiD-DiT's


class TimeOptions(Protocol):
    """Options of a term that chooses its time law.

    Attributes:
      times: "uniform", on the schedule's grid; "shifted", uniform on that grid after SD3's
        `shift`: sigma = s u / (1 + (s - 1) u); or "logit_normal", sigma = sigmoid(N(mean, std^2)).
        The last two are laws of flow schedules. sigma / alpha is then log-normal, as also in sCM,
        whose angle is arctan(sigma / alpha).
      shift: s.
      logit_mean, logit_std: mean and standard deviation.
    """

    times: str
    shift: float
    logit_mean: float
    logit_std: float


def draw_timesteps(context: Context, options: TimeOptions, low: float, high: float):
    """Timesteps [B] by a term's time law, from the stream "t".

    Args:
      context: schedule and random streams.
      options: the term.
      low, high: fractions of the schedule's span; with "shifted", of the grid before its shift;
        with "logit_normal" times beyond them are clamped.
    """
    check_law_of_schedule(options, context.schedule)
    if options.times == "logit_normal":
        schedule, share_B = context.schedule, context.uniform("t")
        logit_B = options.logit_mean + options.logit_std * jax.scipy.special.ndtri(share_B)
        first = max(low * schedule.last, schedule.spacing)
        return jnp.clip(jax.nn.sigmoid(logit_B) * schedule.last, first, high * schedule.last)
    t_B = uniform_timesteps(context, low, high)
    if options.times == "shifted":
        last = context.schedule.last
        return jnp.minimum(shift_time(t_B, options.shift, last), last)  # rounding goes beyond
    return t_B


def uniform_timesteps(context: Context, low: float, high: float):
    """Timesteps [B], uniform between the fractions `low` and `high` of the schedule's span.

    They lie on the schedule's grid: its clean time plus multiples of its spacing.
    """
    schedule = context.schedule
    count = (schedule.last - schedule.clean) / schedule.spacing
    place_B = jnp.floor((low + (high - low) * context.uniform("t")) * count) + 1
    return place_B * schedule.spacing + schedule.clean


def timesteps_below(context: Context, end_B, name: str):
    """Timesteps [B] on the schedule's grid, uniform from the first noised one to below `end_B`.

    Args:
      context: schedule and random streams.
      end_B: times above the first noised one.
      name: random stream.
    """
    schedule = context.schedule
    count_B = jnp.maximum(jnp.ceil((end_B - schedule.clean) / schedule.spacing) - 1, 1)
    place_B = jnp.floor(context.uniform(name) * count_B) + 1
    return place_B * schedule.spacing + schedule.clean


def uniform_angle(context: Context):
    """Times [B], uniform in atan2(sigma, alpha), from the first noised to the student's first."""
    return times_at_share(context, context.uniform("angle"))


def times_at_share(context: Context, share_B):
    """Times at which the angle is at a share of its span.

    Args:
      context: schedule and the student's grid.
      share_B: 0 for the first noised time, 1 for the student's first.
    """
    angles, knots = angle_table(context)
    return jnp.interp(angles[0] + share_B * (angles[-1] - angles[0]), angles, knots)


def log_normal_times(context: Context, mean: float, std: float):
    """Times [B] whose sigma / alpha is log-normal, clamped to the span of `angle_table`.

    Args:
      context: schedule, grid and random streams; the stream is "angle".
      mean, std: mean and standard deviation of log(sigma / alpha).
    """
    normal_B = jax.scipy.special.ndtri(context.uniform("angle"))
    return times_at_ratio(context, jnp.exp(mean + std * normal_B))


def times_at_ratio(context: Context, ratio_B):
    """Times [B] at which sigma / alpha is `ratio_B`, clamped to the span of `angle_table`."""
    angles, knots = angle_table(context)
    return jnp.interp(jnp.arctan(ratio_B), angles, knots)


def angle_table(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Angles atan2(sigma, alpha), and the times that have them: from the first noised time, in
    steps of the schedule's spacing, to the student's first."""
    schedule = context.schedule
    first = schedule.clean + schedule.spacing
    knots = np.append(np.arange(first, context.times[0], schedule.spacing), context.times[0])
    alpha, sigma = schedule.alpha_sigma(knots)
    return np.arctan2(sigma, alpha), knots


def check_span_fractions(name: str, low: float, high: float) -> None:
    """Check a term's options `low` and `high`: fractions of the schedule's span, in order.

    Raises: InputError otherwise.
    """
    if not 0 <= low < 1:
        raise InputError(f"objective.{name}.low: found {low}; expected a share from 0 to below 1")
    if not low <= high <= 1:
        raise InputError(f"objective.{name}.high: found {high}; expected a share from {low} to 1")


def check_log_normal(name: str, mean: float, std: float) -> None:
    """Check a term's options `mean` and `std` of log(sigma / alpha).

    Raises: InputError for a mean that is no number, or a standard deviation that is not above 0.
    """
    if not abs(mean) < inf:
        raise InputError(f"objective.{name}.mean: found {mean}; expected a number")
    if not 0 < std < inf:
        raise InputError(f"objective.{name}.std: found {std}; expected more than 0")


def check_law(name: str, options: TimeOptions) -> None:
    """Check the options of a term's time law.

    Raises: InputError for an unknown law, for numbers that it cannot have, and for those of another
      law, which would have no effect.
    """
    check_choice(f"objective.{name}.times", options.times, TIMES)
    defaults = {"shift": 3.0, "logit_mean": LOGIT_MEAN, "logit_std": LOGIT_STD}
    law_of = {"shift": "shifted", "logit_mean": "logit_normal", "logit_std": "logit_normal"}
    for option, law in law_of.items():
        value = getattr(options, option)
        if options.times != law and value != defaults[option]:
            raise InputError(
                f"objective.{name}.{option}: found {value} with times={options.times!r}; expected "
                f"times={law!r}"
            )
    for option in ("shift", "logit_std"):
        value = getattr(options, option)
        if not 0 < value < inf:
            raise InputError(f"objective.{name}.{option}: found {value}; expected more than 0")
    if not -inf < options.logit_mean < inf:
        raise InputError(
            f"objective.{name}.logit_mean: found {options.logit_mean}; expected a number"
        )


def check_law_of_schedule(options: TimeOptions, schedule: NoiseSchedule) -> None:
    """Check that a term's time law exists on the teacher's schedule.

    Raises: InputError for a law of flow schedules on another one.
    """
    if options.times != "uniform" and not isinstance(schedule, Flow):
        raise InputError(
            f"objective: found times={options.times!r} on the schedule {type(schedule).__name__}; "
            "expected times='uniform', or a flow teacher"
        )
