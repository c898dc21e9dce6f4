"""Plain denoising: how a teacher is trained."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.objectives.base import Context, Needs
from gadjax.objectives.compose import Addable


@dataclass(frozen=True)
class Denoising(Addable):
    """E |raw(x_t, t, c) - target|^2 with x_t = alpha x0 + sigma eps (Ho et al. 2020, eq. 14).

    t is uniform over the schedule's whole times; eps is the batch's noise. Nothing is
    stop-gradiented. One network evaluation. Condition dropout belongs to the data.
    """

    needs = Needs(images=True)

    def __call__(self, context: Context):
        schedule = context.schedule
        count = schedule.last - schedule.clean
        t_B = jnp.floor(context.uniform("t") * count) + schedule.clean + 1
        batch = context.batch
        loss_B = context.denoiser.denoising_loss(
            context.student_params, batch.x0, batch.noise, t_B, batch.cond
        )
        return loss_B, {}
