"""Continuous-time distribution matching (CDM): on and off the student's own trajectory."""

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


@dataclass(frozen=True)
class CDM(Addable):
    """Guidance, DMD without guidance, and DMD where the student's trajectory does not pass.

    Each part moves an x0 by a direction over N = max(mean|x0 - T_c|, `floor`), T_c and T_u the
    teacher with and without the prompt, w the run's guidance (arXiv 2605.06376, code at
    byliutao/cdm):
      w (T_c - T_u) at x_s, s uniform below the drawn step's time: augmentation by guidance;
      T_c - F       at x_t, t uniform between `low` and `high` of the span: distribution matching;
      T_c - F       likewise, on the x0 of a student that starts off its trajectory: at t' of the
                    same law, from alpha' x0 + sigma' eps, x0 and eps being those of the drawn step.
    Each loss is the mean square, without a half, of the x0 and its moved value, which is
    stop-gradiented, as is the latent off the trajectory.
    The paper's grids are `student.redraw = (0.25, 0.95)` and its critic also takes over a
    thousandth of the student at each update, `critic.follow = 0.001`. Not here: one to 28 steps by
    chance; the number of steps is the student's.
    Cost beside the student: another evaluation of it, 4 of the teacher and 2 of the critic.
    """

    low: float = 0.02
    high: float = 0.98
    floor: float = 0.1

    needs = Needs(student=True, critic=True)

    def __post_init__(self):
        check_span_fractions("cdm", self.low, self.high)
        if not self.floor > 0:
            raise InputError(f"objective.cdm.floor: found {self.floor}; expected more than 0")

    def check_denoiser(self, denoiser: Denoiser) -> None:
        check_separate_prompts("cdm", denoiser)

    def __call__(self, context: Context):
        prediction = context.student[0]
        s_B = timesteps_below(context, context.t_B, "guidance/t")
        x_s = sg(add_noise(context.schedule, prediction.x0, context.normal("guidance/eps"), s_B))
        cond, uncond = context.teacher(x_s, s_B, 1).x0, context.teacher(x_s, s_B, 0).x0
        guidance = self.moved(prediction.x0, context.guidance * (cond - uncond), cond)
        matching, gap = self.matching(context, prediction.x0)
        off = context.with_stream("off")
        t_B = uniform_timesteps(off, self.low, self.high)
        x_t = sg(add_noise(context.schedule, prediction.x0, prediction.eps, t_B))
        off_path, _ = self.matching(off.with_stream("t0"), context.net("student", x_t, t_B).x0)
        return guidance + matching + off_path, {"gap": gap}

    def matching(self, context: Context, x0):
        """Loss per sample [B] of DMD without guidance, and mean |T_c - F|."""
        t_B = uniform_timesteps(context, self.low, self.high)
        x_t = sg(add_noise(context.schedule, x0, context.normal("eps"), t_B))
        fake, real = context.critic(x_t, t_B).x0, context.teacher(x_t, t_B, 1).x0
        return self.moved(x0, real - fake, real), jnp.mean(jnp.abs(real - fake))

    def moved(self, x0, direction, real):
        """Mean square [B] of x0 and x0 + direction / N."""
        return 2 * pseudo_loss(x0, sg(-direction), mean_abs(sg(x0) - real, self.floor))

    def critic_loss(self, context: Context):
        """Denoising loss per sample [B] on the student's x0, t by the same law."""
        t_B = uniform_timesteps(context, self.low, self.high)
        return critic_denoising_loss(context, context.student[0].x0, t_B)
