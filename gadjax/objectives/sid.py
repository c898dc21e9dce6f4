"""Score identity distillation (SiD), with gradients through the score networks' inputs."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.schedules import add_noise
from gadjax.errors import check_choice
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import critic_denoising_loss, mean_abs, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import (
    LOGIT_MEAN,
    LOGIT_STD,
    check_law,
    check_law_of_schedule,
    check_span_fractions,
    draw_timesteps,
)

# Name -> guidance of the teacher (None: the run's) and of the critic ("same": the teacher's).
GUIDANCE = {"teacher": (None, 1), "lsg": (None, "same"), "zero": (1, 0), "anti": (1, -1)}


@dataclass(frozen=True)
class SiD(Addable):
    """mean[(T - F) . ((T - x0) - alpha (T - F))] / mean|x0 - T|, T and F at x_t (arXiv 2404.04057).

    T and F are the teacher's and the critic's x0 at x_t = a x0 + s eps, t uniform between `low` and
    `high` of the schedule's span. Unlike DMD the gradient passes x0, x_t and both networks' inputs;
    only their parameters and the normaliser are stop-gradiented. The student's x0 is its drawn
    step's on its own latents, so that few steps are trained as a uniform mixture over them (arXiv
    2505.12674).
    guidance: "teacher", the run's scale for T and none for F; "lsg", the run's for both, F trained
      with it (long and short guidance, arXiv 2406.01561); "zero", none for T and an unconditional
      F; "anti", none for T and -1 for F (both arXiv 2505.12674). F is trained with the
      guidance at which it is evaluated.
    weighting: "x0", the division by mean|x0 - T| above; "1 - sigma", that factor in its place, as
      in SiD-DiT's code for flow models.
    times, shift, logit_mean, logit_std: time law (`gadjax.objectives.time_laws`), of the critic
      too, which has the full span. SiD-DiT's code is "logit_normal".
    Cost beside the student: 1 or 2 evaluations each of T and F, and their reverse passes.
    """

    alpha: float = 1.0
    guidance: str = "teacher"
    low: float = 0.02
    high: float = 0.98
    weighting: str = "x0"
    times: str = "uniform"
    shift: float = 3.0
    logit_mean: float = LOGIT_MEAN
    logit_std: float = LOGIT_STD

    needs = Needs(student=True, critic=True)

    def __post_init__(self):
        check_choice("objective.sid.guidance", self.guidance, GUIDANCE)
        check_choice("objective.sid.weighting", self.weighting, ("x0", "1 - sigma"))
        check_span_fractions("sid", self.low, self.high)
        check_law("sid", self)

    def check_denoiser(self, denoiser: Denoiser) -> None:
        check_law_of_schedule(self, denoiser.schedule)

    def guidance_scales(self, context: Context):
        """Guidance scales of teacher and critic."""
        teacher, critic = GUIDANCE[self.guidance]
        teacher = context.guidance if teacher is None else teacher
        return teacher, teacher if critic == "same" else critic

    def __call__(self, context: Context):
        x0 = context.student[0].x0
        t_B = draw_timesteps(context, self, self.low, self.high)
        x_t = add_noise(context.schedule, x0, context.normal("eps"), t_B)
        teacher_scale, critic_scale = self.guidance_scales(context)
        real, fake = (
            context.teacher(x_t, t_B, teacher_scale).x0,
            context.critic(x_t, t_B, critic_scale).x0,
        )
        gap = real - fake
        loss_B = sample_mean(gap * ((real - x0) - self.alpha * gap))
        if self.weighting == "x0":
            loss_B = loss_B / mean_abs(sg(x0 - real))
        else:
            loss_B = loss_B * (1 - context.schedule.alpha_sigma(t_B)[1])
        return loss_B, {"gap": jnp.mean(jnp.abs(gap))}

    def critic_loss(self, context: Context):
        """Denoising loss per sample [B] on the student's x0, with F's guidance."""
        t_B, scale = draw_timesteps(context, self, 0.0, 1.0), self.guidance_scales(context)[1]
        return critic_denoising_loss(context, context.student[0].x0, t_B, scale)
