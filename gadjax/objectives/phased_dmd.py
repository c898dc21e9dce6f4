"""Phased DMD: distribution matching of every step's own end, without its x0."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.parameterization import from_prediction
from gadjax.diffusion.schedules import renoise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import mean_abs, pseudo_loss, sg, student_map
from gadjax.objectives.compose import Addable
from gadjax.types import Prediction, expand


@dataclass(frozen=True)
class PhasedDMD(Addable):
    """d L / d x_s = (F(x_t) - T_w(x_t)) / mean|x_t - T_w(x_t)|, x_t diffused from x_s.

    x_s is the end of the student's drawn step, at the next time s of its grid, and t uniform
    between s and the last time: each step is matched on its own interval of noise levels, from the
    latents that it hands to the next (arXiv 2510.27684). F, T_w and x_t are stop-gradiented.
    The critic has no x0 to denoise to. Of x_t = (alpha_t / alpha_s) x_s + rho eps, with rho^2 =
    sigma_t^2 - (alpha_t sigma_s / alpha_s)^2, the score is E[-eps / rho], so that its target is the
    prediction with eps* = sigma_t eps / rho and x0* = (x_t - sigma_t eps*) / alpha_t. For a flow
    that is the paper's velocity, (alpha_s^2 sigma_t + alpha_t sigma_s^2) eps / (alpha_s^2 rho) -
    x_s / alpha_s. The loss has the weight min(1 / rho^2, `max_weight`).
    The paper trains an expert for each phase, one after the other: runs with
    `student.trained_steps` and `student.earlier_expert`, each with a critic of its own. Without
    them one student has all phases. The normaliser is ours, the paper's is not known to us.
    Cost beside the student: 2 teacher evaluations and 1 of the critic.
    """

    max_weight: float = 10.0

    needs = Needs(student=True, next_latent=True, critic=True)

    def __post_init__(self):
        if not self.max_weight > 0:
            raise InputError(
                f"objective.phased_dmd.max_weight: found {self.max_weight}; expected more than 0"
            )

    def diffused(self, context: Context):
        """x_s and x_t [B, H, W, C], t [B], and the noise between them."""
        x_s, eps = student_map(context, "next"), context.normal("eps")
        spacing, s_B = context.schedule.spacing, context.next_B.astype(x_s.dtype)
        count_B = jnp.floor((context.schedule.last - s_B) / spacing)
        t_B = s_B + spacing * (jnp.floor(context.uniform("t") * count_B) + 1)
        return x_s, renoise(context.schedule, x_s, s_B, t_B, eps), t_B, eps

    def __call__(self, context: Context):
        x_s, x_t, t_B, _ = self.diffused(context)
        x_t = sg(x_t)
        fake, real = context.critic(x_t, t_B).x0, context.teacher(x_t, t_B).x0
        loss_B = pseudo_loss(x_s, sg(fake - real), mean_abs(x_t - real))
        return loss_B, {"gap": jnp.mean(jnp.abs(fake - real))}

    def critic_loss(self, context: Context):
        """Denoising loss per sample [B] on x_t, against the score of x_t given x_s."""
        x_s, x_t, t_B, eps = self.diffused(context)
        x_t, denoiser = sg(x_t), context.denoiser
        (alpha, sigma), (alpha_s, sigma_s) = map(
            context.schedule.alpha_sigma, (t_B, context.next_B.astype(t_B.dtype))
        )
        rho = jnp.sqrt(sigma**2 - (alpha * sigma_s / alpha_s) ** 2)
        # x0* = (x_t - sigma eps*) / alpha without the division by alpha, which ends at zero.
        share = alpha * (sigma_s / alpha_s) ** 2 / rho
        x0_star = sg(x_s) / expand(alpha_s, eps) - expand(share, eps) * eps
        star = Prediction(x0_star, expand(sigma / rho, eps) * eps)
        target = from_prediction(denoiser.parameterization, star, alpha, sigma)
        raw = denoiser.raw(context.critic_params, x_t, t_B, context.batch.cond)
        return jnp.minimum(1 / rho**2, self.max_weight) * sample_mean((raw - target) ** 2)
