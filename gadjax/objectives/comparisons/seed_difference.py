"""Difference between two seeds' pictures, in place of a derivative, for comparison with GAD."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.diffusion.rollout import interpolate_times, rollout
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import check_count, sg
from gadjax.objectives.compose import Addable


@dataclass(frozen=True)
class SeedDifference(Addable):
    """1 - cos(P(x0_S(x_k) - x0_S(y_k)), P(x0_T(x_k) - x0_T(y_k))), P the mean over cells.

    The loss of adapters that people publish against lost seeds (SDA for Z-Image-Turbo, as its card
    describes it): x_k and y_k are the student's latents of two initial noises under one prompt, at
    its drawn step; S and T are evaluated at both. A finite difference over the noise where GAD has
    the derivative; a cosine alone, so that something else (`tether`) has to hold the size. The last
    step has no such term.
    steps: of the teacher's guided ODE to x0; 1 is its prediction there, as in those adapters.
    cells: side of the grid of cells of P (16: 8 x 8 latents each at 1024 pixels).
    y_k and the teacher are stop-gradiented.
    Cost: 4 * steps teacher evaluations, and the student's: 1 with gradient beside the base's, and
    n - 1 to y_k.
    """

    steps: int = 1
    cells: int = 16

    needs = Needs(student=True, next_latent=True, teacher=True)

    def __post_init__(self):
        check_count("seed_difference", "steps", self.steps, 1)
        check_count("seed_difference", "cells", self.cells, 1)

    def check(self, times: Sequence[float]) -> None:
        if len(times) < 2:
            raise InputError(
                f"student.steps: found {len(times)}; expected at least 2, because seed_difference "
                "leaves the last one out"
            )

    def __call__(self, context: Context):
        pair = context.x_BHWC, latents_of_other_noise(context)
        clean_B = jnp.full_like(context.t_B, context.schedule.clean)
        grid = interpolate_times(context.t_B, clean_B, self.steps)
        real = [sg(rollout(context.teacher, context.schedule, x, grid).end) for x in pair]
        other = context.net("student", pair[1], context.t_B).x0
        a = mean_over_cells(real[0] - real[1], self.cells)
        b = mean_over_cells(context.student[0].x0 - other, self.cells)
        norms_B = sample_mean(a**2) * sample_mean(b**2)
        cosine_B = sample_mean(a * b) * jax.lax.rsqrt(norms_B + jnp.finfo(a.dtype).tiny)
        steps = len(context.times) - 1
        weight_B = (context.step_B < steps - 1) * jnp.float32(steps / (steps - 1))
        return (1 - cosine_B) * weight_B, {"cosine": jnp.mean(sg(cosine_B) * weight_B)}


def latents_of_other_noise(context: Context):
    """The student's latents [B, H, W, C] at the drawn steps from noise of their own."""
    starts = jnp.asarray(context.times[:-1]) if context.grid_NB is None else context.grid_NB[:-1]
    walk = rollout(
        lambda x, t: context.net("student", x, t),
        context.schedule,
        context.normal("other"),
        starts,
    )
    states = jnp.concatenate([walk.x, walk.end[None]])
    return sg(states[context.step_B, jnp.arange(len(context.step_B))])


def mean_over_cells(x_BHWC, cells: int):
    """Means [B, h, w, C] over a grid of at most cells x cells cells."""
    for axis in (1, 2):
        side = x_BHWC.shape[axis]
        count = min(cells, side)
        member = jax.nn.one_hot(jnp.arange(side) * count // side, count, dtype=x_BHWC.dtype)
        x_BHWC = jnp.moveaxis(
            jnp.tensordot(x_BHWC, member / member.sum(0), axes=(axis, 0)), -1, axis
        )
    return x_BHWC
