"""Decoupled DMD: distribution matching and guidance at noise levels that are drawn separately."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import (
    check_separate_prompts,
    critic_denoising_loss,
    mean_abs,
    pseudo_loss,
    sg,
)
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import check_span_fractions, timesteps_below, uniform_timesteps
from gadjax.types import expand


@dataclass(frozen=True)
class DecoupledDMD(Addable):
    """d L / d x0 = (F - T_c)(x_t) / N_t - (w - 1) (T_c - T_u)(x_s) / N_s (arXiv 2511.22677).

    DMD's direction F - T_w is the sum of both parts at one time. Here the first, distribution
    matching, is at t uniform between `low` and `high` of the schedule's span; the second, the
    augmentation by classifier-free guidance, at s uniform below the drawn step's time, where the
    student has not fixed yet what guidance sharpens. T_c and T_u are the teacher with and without
    the prompt, x_t and x_s have noises of their own, and N = max(mean|x0 - T_c|, `floor`) at each
    of the two times: the normaliser of CDM's code (arXiv 2605.06376), as this paper's is not
    public. Without the floor guidance has its largest weight where s is small and T_c is nearly x0.
    Everything but the leading x0 is stop-gradiented. The critic is DMD's.
    Cost beside the student: 3 teacher evaluations and 1 of the critic.
    """

    low: float = 0.0
    high: float = 1.0
    floor: float = 0.1

    needs = Needs(student=True, critic=True)

    def __post_init__(self):
        check_span_fractions("decoupled_dmd", self.low, self.high)
        if not self.floor > 0:
            raise InputError(
                f"objective.decoupled_dmd.floor: found {self.floor}; expected more than 0"
            )

    def check_denoiser(self, denoiser: Denoiser) -> None:
        check_separate_prompts("decoupled_dmd", denoiser)

    def __call__(self, context: Context):
        x0 = context.student[0].x0
        t_B = uniform_timesteps(context, self.low, self.high)
        s_B = timesteps_below(context, context.t_B, "guidance/t")
        x_t = sg(add_noise(context.schedule, x0, context.normal("eps"), t_B))
        x_s = sg(add_noise(context.schedule, x0, context.normal("guidance/eps"), s_B))
        fake, real = context.critic(x_t, t_B).x0, context.teacher(x_t, t_B, 1).x0
        cond, uncond = context.teacher(x_s, s_B, 1).x0, context.teacher(x_s, s_B, 0).x0
        matching, guidance = fake - real, (context.guidance - 1) * (uncond - cond)
        gradient = matching / expand(mean_abs(sg(x0) - real, self.floor), x0)
        gradient += guidance / expand(mean_abs(sg(x0) - cond, self.floor), x0)
        metrics = {"gap": jnp.mean(jnp.abs(matching)), "guidance": jnp.mean(jnp.abs(guidance))}
        return pseudo_loss(x0, sg(gradient), 1.0), metrics

    def critic_loss(self, context: Context):
        """Denoising loss per sample [B] on the student's x0, t uniform over the full span."""
        t_B = uniform_timesteps(context, 0.0, 1.0)
        return critic_denoising_loss(context, context.student[0].x0, t_B)
