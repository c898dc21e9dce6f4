"""Distribution matching distillation (DMD) in DMD2's few-step form."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import (
    check_span_fractions,
    mean_abs,
    pseudo_loss,
    sg,
    uniform_timesteps,
)
from gadjax.objectives.compose import Addable
from gadjax.types import Prediction


@dataclass(frozen=True)
class DMD(Addable):
    """Reverse KL between student's and teacher's diffused distributions.

    d L / d x0 = (F(x_t) - T_w(x_t)) / mean|x0 - T_w(x_t)|, x_t = alpha x0 + sigma eps,
    t uniform between `low` and `high` of the schedule's span. (Yin et al. 2023,
    2024.)

    The student's x0 comes from its drawn step on its own latents (backward simulation), or with
    backprop="all" from the end of a rollout that is differentiated through all its steps, as
    DP-DMD does it (arXiv 2602.03139). F, T_w and x_t inside them are stop-gradiented.
    Cost beside the student: 2 teacher evaluations (guidance) and 1 of the critic.
    """

    low: float = 0.02
    high: float = 0.98
    backprop: str = "step"

    def __post_init__(self):
        if self.backprop not in ("step", "all"):
            raise InputError(
                f"objective.dmd.backprop: found {self.backprop!r}; expected 'step' or 'all'"
            )
        check_span_fractions("dmd", self.low, self.high)

    @property
    def needs(self) -> Needs:
        if self.backprop == "all":
            return Needs(endpoint=True, critic=True)
        return Needs(student=True, critic=True)

    def output(self, context: Context):
        """The student's x0 [B, H, W, C]."""
        return context.endpoint if self.backprop == "all" else context.student[0].x0

    def __call__(self, context: Context):
        x0 = self.output(context)
        t_B = uniform_timesteps(context, self.low, self.high)
        x_t = sg(add_noise(context.schedule, x0, context.normal("eps"), t_B))
        fake, real = context.critic(x_t, t_B).x0, context.teacher(x_t, t_B).x0
        loss_B = pseudo_loss(x0, sg(fake - real), mean_abs(sg(x0) - real))
        return loss_B, {"gap": jnp.mean(jnp.abs(fake - real))}

    def critic_loss(self, context: Context):
        """Denoising loss per sample [B] on the student's x0, t uniform over the full span."""
        x0 = self.output(context)
        t_B = uniform_timesteps(context, 0.0, 1.0)
        return context.denoiser.denoising_loss(
            context.critic_params,
            Prediction(sg(x0), context.normal("eps")),
            t_B,
            context.batch.cond,
        )
