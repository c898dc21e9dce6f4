"""Trajectory distribution matching (TDM): DMD along the student's own trajectory."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.schedules import renoise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import mean_abs, pseudo_loss, sg, student_map
from gadjax.objectives.compose import Addable
from gadjax.types import expand


@dataclass(frozen=True)
class TDM(Addable):
    """d L / d x0 = H'(F(x_tau) - T_w(x_tau)) / mean|x0 - T_w(x_tau)| (arXiv 2503.06674).

    x_tau is the student's next latent diffused further, to tau uniform between its own time (but
    at least `floor`) and `gap` below the drawn step's, so that every step is matched within its
    own interval. H is the pseudo-Huber loss with c = `huber` of the released script, which the
    public GAD code builds on. F, T_w and x_tau inside them are stop-gradiented.
    Cost beside the student: 2 teacher evaluations and 1 of the critic.
    """

    huber: float = 1e-3
    floor: float = 20.0
    gap: float = 10.0
    max_snr: float = 5.0

    needs = Needs(student=True, next_latent=True, critic=True)

    def __post_init__(self):
        for name in ("huber", "floor", "gap", "max_snr"):
            if not getattr(self, name) >= 0:
                raise InputError(
                    f"objective.tdm.{name}: found {getattr(self, name)}; expected 0 or more"
                )

    def check(self, times: Sequence[float]) -> None:
        if not self.floor < times[0]:
            raise InputError(
                f"objective.tdm.floor: found {self.floor}; expected less than {times[0]}, from "
                "which the student starts"
            )

    def renoised(self, context: Context):
        """x_tau [B, H, W, C], tau [B], and the fresh noise in x_tau."""
        low_B = jnp.maximum(context.next_B, self.floor)
        spacing = context.schedule.spacing
        high_B = jnp.maximum(context.t_B - self.gap, low_B + spacing)
        tau_B = low_B + context.uniform("tau") * (high_B - low_B)
        tau_B = jnp.floor(tau_B / spacing) * spacing
        fresh = context.normal("eps")
        x_next = student_map(context, "next")
        return renoise(context.schedule, x_next, context.next_B, tau_B, fresh), tau_B, fresh

    def __call__(self, context: Context):
        x0 = context.student[0].x0
        x_tau, tau_B, _ = self.renoised(context)
        x_tau = sg(x_tau)
        fake, real = context.critic(x_tau, tau_B).x0, context.teacher(x_tau, tau_B).x0
        loss_B = pseudo_loss(x0, sg(fake - real), mean_abs(sg(x0) - real), self.huber)
        return loss_B, {"gap": jnp.mean(jnp.abs(fake - real))}

    def critic_loss(self, context: Context):
        """Denoising loss per sample [B]: min(SNR, max_snr) IS |F(x_tau) - x0|^2.

        The importance weight IS = exp((|eps|^2 - |mix|^2) / 2), with means over elements, reweights
        from the trajectory's noise `mix` to fresh noise `eps`.
        """
        x0 = sg(context.student[0].x0)
        x_tau, tau_B, fresh = self.renoised(context)
        x_tau = sg(x_tau)
        alpha, sigma = context.schedule.alpha_sigma(tau_B)
        mix = (x_tau - expand(alpha, x0) * x0) / expand(sigma, x0)
        density_B = jnp.exp(0.5 * (sample_mean(fresh**2) - sample_mean(mix**2)))
        weight_B = density_B * jnp.minimum((alpha / sigma) ** 2, self.max_snr)
        prediction = context.denoiser(context.critic_params, x_tau, tau_B, context.batch.cond)
        return weight_B * sample_mean((prediction.x0 - x0) ** 2)
