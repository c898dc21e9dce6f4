"""Distribution matching distillation (DMD) in DMD2's few-step form."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError, check_choice
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import (
    check_guidance_range,
    critic_denoising_loss,
    drawn_guidance,
    mean_abs,
    pseudo_loss,
    sg,
)
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import (
    LOGIT_MEAN,
    LOGIT_STD,
    check_law,
    check_law_of_schedule,
    check_span_fractions,
    draw_timesteps,
)


@dataclass(frozen=True)
class DMD(Addable):
    """Reverse KL between student's and teacher's diffused distributions.

    d L / d x0 = (F(x_t) - T_w(x_t)) / mean|x0 - T_w(x_t)|, x_t = alpha x0 + sigma eps,
    t uniform between `low` and `high` of the schedule's span. (Yin et al. 2023,
    2024.)

    The student's x0 comes from its drawn step on its own latents (backward simulation), or with
    backprop="all" from the end of a rollout that is differentiated through all its steps, as
    DP-DMD does it (arXiv 2602.03139). F, T_w and x_t inside them are stop-gradiented.
    normalizer: "x0" as above; "x_t", mean|x_t - T_w(x_t)|, which DP-DMD's code divides by.
    times, shift, logit_mean, logit_std: time law (`gadjax.objectives.time_laws`), of the critic
      too, which has the full span. DP-DMD's code is "shifted".
    guidance_range: two guidance scales, between which each sample's w is uniform, as in SNOOPI's
      PG-SB (arXiv 2412.02687; there 2 to 5, with VSD's weight of t); () for the run's scale.
    Cost beside the student: 2 teacher evaluations (guidance) and 1 of the critic.
    """

    low: float = 0.02
    high: float = 0.98
    backprop: str = "step"
    normalizer: str = "x0"
    times: str = "uniform"
    shift: float = 3.0
    logit_mean: float = LOGIT_MEAN
    logit_std: float = LOGIT_STD
    guidance_range: tuple[float, ...] = ()

    def __post_init__(self):
        if self.backprop not in ("step", "all"):
            raise InputError(
                f"objective.dmd.backprop: found {self.backprop!r}; expected 'step' or 'all'"
            )
        check_choice("objective.dmd.normalizer", self.normalizer, ("x0", "x_t"))
        check_span_fractions("dmd", self.low, self.high)
        check_law("dmd", self)
        check_guidance_range("dmd", self.guidance_range)

    @property
    def needs(self) -> Needs:
        if self.backprop == "all":
            return Needs(endpoint=True, critic=True)
        return Needs(student=True, critic=True)

    def check_denoiser(self, denoiser: Denoiser) -> None:
        check_law_of_schedule(self, denoiser.schedule)

    def output(self, context: Context):
        """The student's x0 [B, H, W, C]."""
        return context.endpoint if self.backprop == "all" else context.student[0].x0

    def __call__(self, context: Context):
        x0 = self.output(context)
        t_B = draw_timesteps(context, self, self.low, self.high)
        x_t = sg(add_noise(context.schedule, x0, context.normal("eps"), t_B))
        fake = context.critic(x_t, t_B).x0
        real = context.teacher(x_t, t_B, drawn_guidance(context, self.guidance_range)).x0
        distance = (sg(x0) if self.normalizer == "x0" else x_t) - real
        loss_B = pseudo_loss(x0, sg(fake - real), mean_abs(distance))
        return loss_B, {"gap": jnp.mean(jnp.abs(fake - real))}

    def critic_loss(self, context: Context):
        """Denoising loss per sample [B] on the student's x0, t over the full span."""
        t_B = draw_timesteps(context, self, 0.0, 1.0)
        return critic_denoising_loss(context, self.output(context), t_B)
