"""Score implicit matching (SIM): a divergence of scores, by its gradient through the samples."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import critic_denoising_loss
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import check_span_fractions, uniform_timesteps


@dataclass(frozen=True)
class SIM(Addable):
    """mean[(T - F) . (F - x0)] / sqrt(mean|T - F|^2 + c^2), T and F at x_t (arXiv 2410.16794).

    The divergence E d(s_F - s_T) of the scores, d(u) = sqrt(|u|^2 + c^2) - c, is taken at samples
    whose distribution is held; its gradient is that of -d'(s_F - s_T) . (s_F - grad log q(x_t|x0))
    through x0 and x_t (section 3.2 there), which is the above in x0 and up to a weight of t. It is
    SiD with alpha = 1 and another weight of the sample. The gradient passes x0, x_t and both
    networks' inputs, the square root included; the parameters of T_w and F are stop-gradiented.
    c is `huber`, relative to the root of the mean square in x0, and the weight of t is 1: the
    paper's were not at hand. t is uniform between `low` and `high` of the schedule's span. The
    student's x0 is its drawn step's on its own latents; the paper's student has one step. T has the
    run's guidance and F none.
    Cost beside the student: 2 evaluations of the teacher and 1 of the critic, and their reverse
    passes.
    """

    huber: float = 1e-3
    low: float = 0.02
    high: float = 0.98

    needs = Needs(student=True, critic=True)

    def __post_init__(self):
        if not self.huber > 0:
            raise InputError(f"objective.sim.huber: found {self.huber}; expected more than 0")
        check_span_fractions("sim", self.low, self.high)

    def __call__(self, context: Context):
        x0 = context.student[0].x0
        t_B = uniform_timesteps(context, self.low, self.high)
        x_t = add_noise(context.schedule, x0, context.normal("eps"), t_B)
        real, fake = context.teacher(x_t, t_B).x0, context.critic(x_t, t_B).x0
        gap = real - fake
        size_B = jnp.sqrt(sample_mean(gap**2) + self.huber**2)
        return sample_mean(gap * (fake - x0)) / size_B, {"gap": jnp.mean(jnp.abs(gap))}

    def critic_loss(self, context: Context):
        """Denoising loss per sample [B] on the student's x0, t uniform over the full span."""
        t_B = uniform_timesteps(context, 0.0, 1.0)
        return critic_denoising_loss(context, context.student[0].x0, t_B)
