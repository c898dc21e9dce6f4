"""Uni-DAD: distillation from one teacher and adaptation to another at once."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import critic_denoising_loss, mean_abs, pseudo_loss, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.density_ratio import DiscriminatorTerm, check_discriminator_options
from gadjax.objectives.time_laws import check_span_fractions, uniform_timesteps


@dataclass(frozen=True)
class UniDAD(DiscriminatorTerm, Addable):
    """d L / d x0 = (F - (1 - a) T_w - a R_w)(x_t) / mean|x0 - F(x_t)|, and gan softplus(-D).

    T is the run's teacher, R a second one, fine-tuned on a few pictures of the target (`target`: a
    diffusers folder or a workdir), a = `share`; x_t = alpha x0 + sigma eps, t uniform between `low`
    and `high` of the span (arXiv 2511.18281). The normaliser is the paper's, sigma / |eps - eps_F|
    in the scores' units. D, on features of the critic, sees the target's pictures: the run's data.
    F, T_w, R_w and x_t inside them are stop-gradiented.
    features, gan, hidden: of the discriminator, as in `f_distill`.
    Not here: heads on several blocks. The paper's figures are not known to us at first hand.
    Cost beside the student: 4 teacher evaluations and 1 of the critic, and the discriminator's.
    """

    target: str = ""
    share: float = 0.5
    features: str = "critic"
    gan: float = 0.01
    hidden: int = 256
    low: float = 0.02
    high: float = 0.98

    sources = ("target",)

    def __post_init__(self):
        if not self.target:
            raise InputError(
                "objective.uni_dad.target: found nothing; expected a diffusers folder or a workdir "
                "of the teacher that was adapted to the target"
            )
        if not 0 <= self.share <= 1:
            raise InputError(
                f"objective.uni_dad.share: found {self.share}; expected a share from 0 to 1"
            )
        check_discriminator_options("uni_dad", self)
        check_span_fractions("uni_dad", self.low, self.high)

    @property
    def needs(self) -> Needs:
        named = {"uni_dad/target": self.target}
        return Needs(student=True, critic=True, discriminator=True, images=True, networks=named)

    def __call__(self, context: Context):
        x0 = context.student[0].x0
        t_B = uniform_timesteps(context, self.low, self.high)
        x_t = sg(add_noise(context.schedule, x0, context.normal("eps"), t_B))
        fake, source = context.critic(x_t, t_B).x0, context.teacher(x_t, t_B).x0
        target = context.net("uni_dad/target", x_t, t_B, context.guidance).x0
        gradient = fake - (1 - self.share) * source - self.share * target
        loss_B = pseudo_loss(x0, sg(gradient), mean_abs(sg(x0) - fake))
        metrics = {
            "gap": jnp.mean(jnp.abs(gradient)),
            "teachers": jnp.mean(jnp.abs(target - source)),
        }
        return loss_B + self.adversarial_loss(context), metrics

    def critic_loss(self, context: Context):
        """Denoising loss per sample [B] on the student's x0, t uniform over the full span."""
        t_B = uniform_timesteps(context, 0.0, 1.0)
        return critic_denoising_loss(context, context.student[0].x0, t_B)
