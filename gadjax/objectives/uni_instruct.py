"""Uni-Instruct: f-divergences, expanded along the diffusion into a weighted score divergence."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.diffusion.schedules import add_noise
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import critic_denoising_loss, mean_abs, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.density_ratio import (
    DIVERGENCES,
    DiscriminatorTerm,
    check_ratio_options,
    density_ratio,
)
from gadjax.objectives.time_laws import check_span_fractions, uniform_timesteps
from gadjax.types import expand


@dataclass(frozen=True)
class UniInstruct(DiscriminatorTerm, Addable):
    """E_F[h(r) |s_F - s_T|^2] of the scores at x_t, with h(r) = r^2 f''(r) and r = p_T / p_F.

    Half of it times g(t)^2, integrated over t, is the f-divergence of the samples (arXiv
    2505.20755). Its gradient, with k = alpha / sigma^2, s_F - s_T = k (F - T) and grad log r =
    s_T - s_F, is up to k^2 that of the sum over elements
      (h - r h') |T - F|^2 + 2 h (T - F) . (F - x0)
    through x0, x_t and the networks' inputs (score identity: with h = 1, SiD at alpha = 1/2), with
      k [r^2 h'' |T - F|^2 - 2 r h' (T - F) . (F - x0)] (F - T)
    as a further gradient of x_t (distribution matching: what r contributes). As in SiD the loss is
    divided by the number of elements and by mean|x0 - T|, in place of the weight of t. r, h, the
    normaliser and all parameters of T_w and F are stop-gradiented. These equations are derived here
    from the divergence; the paper's weights of t and its tuning are not.
    r is exp(D) of a discriminator, which sees pictures of the data in the teacher's place (clipped
    as in f-distill), and which is the student's opponent with the weight `gan`.
    divergence: "rkl", "kl", "js", "softened_rkl", "neyman", "hellinger" or "jeffreys"; the paper's
      runs have the first two, "jeffreys" and a chi square.
    features, hidden: of the discriminator, as in `adversarial`. t is uniform between `low` and
      `high` of the schedule's span. T has the run's guidance and F none, though r does not know it.
    Cost beside the student: 2 evaluations of the teacher, 1 of the critic and their reverse passes;
    1/2 for r, and with `gan` 1/2 and its reverse pass; the discriminator's as in `adversarial`.
    """

    divergence: str = "kl"
    features: str = "critic"
    gan: float = 0.01
    hidden: int = 256
    low: float = 0.02
    high: float = 0.98

    needs = Needs(student=True, critic=True, discriminator=True, images=True)

    def __post_init__(self):
        check_ratio_options("uni_instruct", self)
        check_span_fractions("uni_instruct", self.low, self.high)

    def __call__(self, context: Context):
        x0 = context.student[0].x0
        t_B = uniform_timesteps(context, self.low, self.high)
        x_t = add_noise(context.schedule, x0, context.normal("eps"), t_B)
        ratio_B = density_ratio(context, self.features, x_t, t_B)
        loss_B, gap = self.expanded(context, x0, x_t, t_B, ratio_B)
        metrics = {"gap": jnp.mean(jnp.abs(gap)), "ratio": jnp.mean(ratio_B)}
        return loss_B + self.adversarial_loss(context), metrics

    def expanded(self, context: Context, x0, x_t, t_B, ratio_B):
        """Loss per sample [B] given the ratio, and T - F.

        Args:
          context: teacher and critic.
          x0, x_t, t_B: the student's samples, with noise, and its times.
          ratio_B: r at x_t.
        """
        real, fake = context.teacher(x_t, t_B).x0, context.critic(x_t, t_B).x0
        gap = real - fake
        square_B, product_B = sample_mean(gap**2), sample_mean(gap * (fake - x0))
        h = DIVERGENCES[self.divergence]
        slope = jax.vmap(jax.grad(h))(ratio_B) * ratio_B
        curvature = jax.vmap(jax.grad(jax.grad(h)))(ratio_B) * ratio_B**2
        value = h(ratio_B)
        score_B = (value - slope) * square_B + 2 * value * product_B
        alpha, sigma = context.schedule.alpha_sigma(t_B)
        size = gap[0].size * alpha / sigma**2
        matching_B = size * (curvature * square_B - 2 * slope * product_B)
        # A value of zero, with the gradient of x_t.
        push_B = sample_mean(sg(expand(matching_B, gap) * -gap) * (x_t - sg(x_t)))
        return (score_B + push_B) / mean_abs(x0 - real), gap

    def critic_loss(self, context: Context):
        """Denoising loss per sample [B] on the student's x0, t uniform over the full span."""
        t_B = uniform_timesteps(context, 0.0, 1.0)
        return critic_denoising_loss(context, context.student[0].x0, t_B)
