"""Shared parts of objectives: pseudo-losses, the critic's loss, the student's step as a map."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import jax
import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.rollout import rollout
from gadjax.diffusion.schedules import NoiseSchedule
from gadjax.errors import InputError, short_repr
from gadjax.objectives.base import Context, sample_mean
from gadjax.types import Prediction, expand

sg = jax.lax.stop_gradient
TARGETS = "ema", "student"


class TargetOption(Protocol):
    """Option of a consistency term.

    Attributes:
      target: whose prediction is the target, one of TARGETS.
    """

    target: str


def update_bin_means(means, value_B, bin_B, decay: float):
    """Running means by bin [bins] with a batch's values; those of bins without a sample stay.

    Args:
      means: before.
      value_B, bin_B: values of the samples, and the bins in which they are.
      decay: of the mean before; the batch's own mean counts 1 - decay.
    """
    sums = jnp.zeros((2, *means.shape)).at[:, bin_B].add(jnp.stack([value_B, 0 * value_B + 1]))
    new = decay * means + (1 - decay) * sums[0] / jnp.maximum(sums[1], 1)
    return jnp.where(sums[1] > 0, new, means)


def check_bins(name: str, prefix: str, bins: int, decay: float) -> None:
    """Check a term's options PREFIX + "bins" and "decay" of running means. Raises: InputError.

    Args:
      name: of the term.
      prefix: of the options' names.
      bins, decay: their values.
    """
    check_count(name, f"{prefix}bins", bins, 0)
    if not 0 <= decay < 1:
        raise InputError(f"objective.{name}.{prefix}decay: found {decay}; expected 0 to below 1")


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


def critic_denoising_loss(context: Context, x0, t_B, scale=None):
    """Denoising loss of the critic per sample [B] on the student's x0, which has no gradient.

    Args:
      context: of the critic's update.
      x0: the student's samples [B, H, W, C].
      t_B: timesteps.
      scale: guidance with which the critic is trained; None for none.
    """
    batch, target = context.batch, Prediction(sg(x0), context.normal("eps"))
    return context.denoiser.denoising_loss(
        context.critic_params, target, t_B, batch.cond, batch.null, scale
    )


def drawn_guidance(context: Context, bounds: Sequence[float]):
    """Guidance scales [B], uniform between two bounds; None, the run's scale, without bounds."""
    if not bounds:
        return None
    low, high = bounds
    return low + (high - low) * context.uniform("guidance")


def check_guidance_range(name: str, bounds: Sequence[float]) -> None:
    """Check a term's option `guidance_range`: (), or two guidance scales in order.

    Raises: InputError otherwise.
    """
    numbers = all(isinstance(v, int | float) and math.isfinite(v) for v in bounds)
    if bounds and not (numbers and len(bounds) == 2 and bounds[0] <= bounds[1]):
        raise InputError(
            f"objective.{name}.guidance_range: found {short_repr(bounds)}; expected two numbers "
            "in order, or ()"
        )


def check_separate_prompts(name: str, denoiser: Denoiser) -> None:
    """Check that a term can evaluate the teacher with and without the prompt.

    Raises: InputError for a teacher with embedded guidance.
    """
    if denoiser.guidance_embedded:
        raise InputError(
            f"objective.{name}: found a teacher with embedded guidance; expected one that can be "
            "evaluated with and without the prompt"
        )


def teacher_step(context: Context, x_t, t_B, r_B):
    """x_r [B, H, W, C] of one guided DDIM/Euler step of the teacher.

    Args:
      context: the teacher and its schedule.
      x_t: latents.
      t_B, r_B: times at which the step starts and ends.
    """
    return rollout(context.teacher, context.schedule, x_t, jnp.stack([t_B, r_B])).end


def target_params(context: Context, term: TargetOption):
    """Parameters of the student in a consistency target: its average, or its own."""
    return context.ema_params if term.target == "ema" else context.student_params


def square_or_huber(error, huber: float):
    """Mean per sample [B] of error^2, or for c = `huber` > 0 of sqrt(error^2 + c^2) - c."""
    if huber:
        return sample_mean(jnp.sqrt(error**2 + huber**2) - huber)
    return sample_mean(error**2)


def check_huber(name: str, huber: float) -> None:
    """Check a term's option `huber`. Raises: InputError for a negative or non-finite one."""
    if not 0 <= huber < math.inf:
        raise InputError(f"objective.{name}.huber: found {huber}; expected 0 or more")


def check_count(name: str, option: str, value: int, least: int) -> None:
    """Check a term's whole number. Raises: InputError for one below `least`."""
    if value < least:
        raise InputError(f"objective.{name}.{option}: found {value}; expected {least} or more")


def student_map(context: Context, end: str):
    """The student's drawn step as a map of x_k, linear in its prediction: [B, H, W, C]."""
    return step_end(context, context.student[0], end)


def student_tangents(context: Context, end: str):
    """Tangents of `student_map` along the context's directions: [J, N, H, W, C]."""
    samples = tangent_samples(context)
    return jax.vmap(lambda pred: step_end(samples, pred, end))(context.student[1])


def tangent_samples(context: Context) -> Context:
    """The context's drawn steps for the samples that have tangents."""
    return part_of(context, context.blocks.chosen) if context.blocks else context


def part_of(context: Context, pick: Callable) -> Context:
    """Batch and drawn steps of some samples; other results stay those of all.

    Args:
      context: of all samples.
      pick: [B, ...] -> their rows.
    """
    batch, step_B, x = jax.tree.map(pick, (context.batch, context.step_B, context.x_BHWC))
    grid_NB = None if context.grid_NB is None else pick(context.grid_NB.T).T
    return replace(context, batch=batch, step_B=step_B, x_BHWC=x, grid_NB=grid_NB)


def step_end(context: Context, pred: Prediction, end: str):
    """End of a drawn step with this prediction: x0 for "clean", else the next latent."""
    if end == "clean":
        return pred.x0
    return ode_step(context.schedule, pred, context.next_B)


def ode_step(schedule: NoiseSchedule, pred: Prediction, end_B):
    """x [B, H, W, C] at times `end_B`, by one DDIM/Euler step with a prediction."""
    alpha, sigma = schedule.alpha_sigma(end_B)
    return expand(alpha, pred.x0) * pred.x0 + expand(sigma, pred.eps) * pred.eps
