"""f-distill: DMD weighted by the density ratio of teacher and student."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.schedules import add_noise
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import (
    check_bins,
    critic_denoising_loss,
    mean_abs,
    pseudo_loss,
    sg,
    update_bin_means,
)
from gadjax.objectives.compose import Addable
from gadjax.objectives.density_ratio import (
    DIVERGENCES,
    DiscriminatorTerm,
    check_ratio_options,
    density_ratio,
)
from gadjax.objectives.time_laws import check_span_fractions, uniform_timesteps
from gadjax.types import Metrics, expand


@dataclass(frozen=True)
class FDistill(DiscriminatorTerm, Addable):
    """d L / d x0 = h(r) (F(x_t) - T_w(x_t)) / mean|x0 - T_w(x_t)|, h(r) = r^2 f''(r).

    The gradient of E_F f(r), r = p_T / p_F at x_t = alpha x0 + sigma eps (arXiv 2502.15681), t
    uniform between `low` and `high` of the schedule's span. With h = 1 it is DMD; h that grows with
    r makes the student cover more modes. h is divided by its mean over the batch. F, T_w, r and x_t
    inside them are stop-gradiented.
    r is exp(D) of a discriminator that sees pictures of the data in the teacher's place, D clipped
    to 10 and r to 0.1 to 20. It is divided by its mean over the batch's samples in each of `bins`
    equal parts of the span; the term remembers the means, a new one counting 1 - `decay` (the
    code's: 10 and 0; bins=0 for r as D has it). D is the student's opponent too: gan softplus(-D).
    divergence: "rkl" (h = 1), "kl" (r), "js" (r / (1 + r)), "softened_rkl" (1 / (1 + r)), "neyman"
      (1 / r), "hellinger" (sqrt r) or "jeffreys" (1 + r).
    features, hidden: of the discriminator, as in `adversarial`.
    Cost beside the student: 2 evaluations of the teacher and 1 of the critic; 1/2 for r, and with
    `gan` 1/2 and its reverse pass; the discriminator's as in `adversarial`.
    """

    divergence: str = "js"
    features: str = "critic"
    gan: float = 1e-3
    hidden: int = 256
    bins: int = 10
    decay: float = 0.0
    low: float = 0.02
    high: float = 0.98

    needs = Needs(student=True, critic=True, discriminator=True, images=True, joint=True)

    def __post_init__(self):
        check_ratio_options("f_distill", self)
        check_span_fractions("f_distill", self.low, self.high)
        check_bins("f_distill", "", self.bins, self.decay)

    def init_memory(self):
        """Means of r in the parts of the span; None without them."""
        return jnp.ones(self.bins) if self.bins else None

    def remember(self, memory, metrics: Metrics):
        return update_bin_means(memory, metrics["ratio_B"], metrics["bin_B"], self.decay)

    def __call__(self, context: Context):
        x0 = context.student[0].x0
        t_B = uniform_timesteps(context, self.low, self.high)
        x_t = sg(add_noise(context.schedule, x0, context.normal("eps"), t_B))
        fake, real = context.critic(x_t, t_B).x0, context.teacher(x_t, t_B).x0
        ratio_B = density_ratio(context, self.features, x_t, t_B)
        metrics = {"gap": jnp.mean(jnp.abs(fake - real)), "ratio": jnp.mean(ratio_B)}
        if self.bins:
            schedule = context.schedule
            place_B = (t_B - schedule.clean) / (schedule.last - schedule.clean) * self.bins
            bin_B = jnp.clip(jnp.floor(place_B), 0, self.bins - 1).astype(jnp.int32)
            metrics |= {"ratio_B": ratio_B, "bin_B": bin_B}
            means = update_bin_means(context.memory, ratio_B, bin_B, self.decay)
            ratio_B = ratio_B / means[bin_B]
        weight_B = DIVERGENCES[self.divergence](ratio_B)
        weight_B = weight_B / jnp.mean(weight_B * context.base_weight_B)
        gradient = expand(weight_B, x0) * (fake - real)
        loss_B = pseudo_loss(x0, sg(gradient), mean_abs(sg(x0) - real))
        return loss_B + self.adversarial_loss(context), metrics

    def critic_loss(self, context: Context):
        """Denoising loss per sample [B] on the student's x0, t uniform over the full span."""
        t_B = uniform_timesteps(context, 0.0, 1.0)
        return critic_denoising_loss(context, context.student[0].x0, t_B)
