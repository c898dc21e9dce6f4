"""Shared parts of objectives: pseudo-losses, random timesteps, the student's step as a map."""

import jax
import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.objectives.base import Context, sample_mean
from gadjax.types import expand

sg = jax.lax.stop_gradient


def pseudo_loss(x, gradient, norm_B, huber: float = 0.0):
    """Loss per sample [B] whose gradient with respect to x is gradient / norm_B / numel.

    Args:
      x: [B, ...].
      gradient: of the shape of x.
      norm_B: normaliser.
      huber: c; if c > 0, sqrt(d^2 + c^2) - c of the difference instead of half its square, as in
        the released TDM script: the gradient's direction elementwise, its size saturated at c.
    """
    if huber:
        difference = x - sg(x - gradient)
        return sample_mean(jnp.sqrt(difference**2 + huber**2) - huber) / norm_B
    difference = x - sg(x - gradient / expand(norm_B, x))
    return 0.5 * sample_mean(difference**2)


def mean_abs(x, floor: float = 1e-4):
    """Mean |x| per sample [B], without gradient; the floor keeps 1 / mean |x| finite."""
    return jnp.maximum(sg(sample_mean(jnp.abs(x))), floor)


def uniform_timesteps(context: Context, low: float, high: float):
    """Timesteps [B], uniform between the fractions `low` and `high` of the schedule's span.

    They lie on the schedule's grid: its clean time plus multiples of its spacing.
    """
    schedule = context.schedule
    count = (schedule.last - schedule.clean) / schedule.spacing
    place_B = jnp.floor((low + (high - low) * context.uniform("t")) * count) + 1
    return place_B * schedule.spacing + schedule.clean


def check_span_fractions(name: str, low: float, high: float) -> None:
    """Check a term's options `low` and `high`: fractions of the schedule's span, in order.

    Raises: InputError otherwise.
    """
    if not 0 <= low < 1:
        raise InputError(f"objective.{name}.low: found {low}; expected a share from 0 to below 1")
    if not low <= high <= 1:
        raise InputError(f"objective.{name}.high: found {high}; expected a share from {low} to 1")


def student_map(context: Context, end: str):
    """The student's drawn step as a map of x_k, linear in its prediction: [B, H, W, C]."""
    return _step_end(context, context.student[0], end)


def student_tangents(context: Context, end: str):
    """Tangents of `student_map` along the context's directions: [J, B, H, W, C]."""
    return jax.vmap(lambda pred: _step_end(context, pred, end))(context.student[1])


def _step_end(context: Context, pred, end: str):
    if end == "clean":
        return pred.x0
    alpha, sigma = context.schedule.alpha_sigma(context.next_B)
    return expand(alpha, pred.x0) * pred.x0 + expand(sigma, pred.eps) * pred.eps
