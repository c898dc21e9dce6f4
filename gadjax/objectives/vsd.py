"""Variational score distillation (VSD), with the weight of SwiftBrush."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import pseudo_loss, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import check_span_fractions, uniform_timesteps
from gadjax.types import expand


@dataclass(frozen=True)
class VSD(Addable):
    """d L / d x0 = sigma^2 (eps_T(x_t) - eps_F(x_t)), x_t = alpha x0 + sigma eps.

    The gradient of DMD in eps, with a weight of t alone and no normaliser, so that its size follows
    the distance of the two networks (SwiftBrush, arXiv 2312.05239, section 3; VSD is
    ProlificDreamer's, arXiv 2305.16213). Both networks are evaluated at the run's guidance, as in
    SwiftBrush's code; where guidance is embedded, the critic at the scale of its training, the
    student's. t is uniform between `low` and `high` of the schedule's span; the student's
    x0 is its drawn step's on its own latents, where SwiftBrush's student has one step. eps_T, eps_F
    and x_t inside them are stop-gradiented.
    The critic minimises alpha^2 |eps_F(x_t) - eps|^2 with t over the full span, without the prompt
    in a share `dropout` of the samples, since its guidance needs both.
    Not here: SwiftBrush's critic is a LoRA on the teacher; here all of the critic is trained.
    Cost beside the student: 2 evaluations each of teacher and critic.
    """

    low: float = 0.02
    high: float = 0.98
    dropout: float = 0.1

    needs = Needs(student=True, critic=True)

    def __post_init__(self):
        check_span_fractions("vsd", self.low, self.high)
        if not 0 <= self.dropout < 1:
            raise InputError(
                f"objective.vsd.dropout: found {self.dropout}; expected a share from 0 to below 1"
            )

    def __call__(self, context: Context):
        x0 = context.student[0].x0
        t_B = uniform_timesteps(context, self.low, self.high)
        x_t = sg(add_noise(context.schedule, x0, context.normal("eps"), t_B))
        embedded = context.denoiser.guidance_embedded
        fake = context.critic(x_t, t_B, None if embedded else context.guidance).eps
        real = context.teacher(x_t, t_B).eps
        _, sigma = context.schedule.alpha_sigma(t_B)
        loss_B = pseudo_loss(x0, sg(expand(sigma**2, x0) * (real - fake)), 1.0)
        return loss_B, {"gap": jnp.mean(jnp.abs(real - fake))}

    def critic_loss(self, context: Context):
        """Loss per sample [B] on the student's x0, some samples without their prompt."""
        t_B, eps = uniform_timesteps(context, 0.0, 1.0), context.normal("eps")
        x_t = add_noise(context.schedule, sg(context.student[0].x0), eps, t_B)
        dropped_B = context.uniform("dropout") < self.dropout
        cond = context.batch.cond.map(
            lambda cond, null: jnp.where(expand(dropped_B, cond), null, cond), context.batch.null
        )
        error = context.denoiser(context.critic_params, x_t, t_B, cond).eps - eps
        alpha, _ = context.schedule.alpha_sigma(t_B)
        return alpha**2 * sample_mean(error**2)
