"""Denoising loss, with which a teacher is trained."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import uniform_timesteps
from gadjax.types import Prediction


@dataclass(frozen=True)
class Denoising(Addable):
    """E w(t) |raw(x_t, t, c) - target|^2 with x_t = alpha x0 + sigma eps (Ho et al. 2020, eq. 14).

    t is uniform over the schedule's grid; eps is the batch's noise. Nothing is
    stop-gradiented. One network evaluation. Condition dropout belongs to the data.

    balance: None for w = 1. A number b gives w = (1 + b) / (alpha^2 + b), between the eps loss
      (b large) and, for an eps network, the v loss (b = 0; Salimans & Ho 2022, section 4): a small
      network otherwise leaves so large an error in eps at high noise that its x0 there is worse
      than a guess.
    """

    balance: float | None = None
    needs = Needs(images=True)

    def __post_init__(self):
        if self.balance is not None and not self.balance >= 0:
            raise InputError(
                f"objective.denoising.balance: found {self.balance}; expected 0 or more"
            )

    def __call__(self, context: Context):
        schedule = context.schedule
        t_B = uniform_timesteps(context, 0.0, 1.0)
        batch = context.batch
        loss_B = context.denoiser.denoising_loss(
            context.student_params, Prediction(batch.x0, batch.noise), t_B, batch.cond
        )
        if self.balance is None:
            return loss_B, {}
        alpha, _ = schedule.alpha_sigma(t_B)
        weight_B = (1 + self.balance) / (alpha**2 + self.balance)
        return loss_B * weight_B, {"unweighted": jnp.mean(loss_B)}
