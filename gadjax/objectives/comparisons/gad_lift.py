"""Tangent of distribution matching (lift), for comparison with the flow-map tangent of GAD."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.geometry import Directions, tangent
from gadjax.diffusion.schedules import add_noise
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import mean_abs, pseudo_loss, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import check_span_fractions, uniform_timesteps
from gadjax.types import expand


@dataclass(frozen=True)
class GADLift(Addable):
    """d L / d (dx0) = (J_F dx - J_T dx) / mean|dx0 - J_T dx|, dx = alpha dx0, at x_t.

    dx0 = J_S(x_k) v is the student's tangent; both networks' tangents are taken along it at the
    re-noised x0 and stop-gradiented: the derivative of DMD's gradient along the noise. Like
    DMD it depends on the student's distribution alone, which a rotation of the noise leaves as it
    is: it can restore how much the image moves with the noise, not the teacher's direction.
    Cost: 4 teacher evaluations and 2 of the critic, and the student's tangent.
    """

    low: float = 0.02
    high: float = 0.98
    direction: str = "gaussian"

    def __post_init__(self):
        check_span_fractions("gad_lift", self.low, self.high)

    @property
    def needs(self) -> Needs:
        return Needs(student=True, tangent=Directions(self.direction), critic=True)

    def __call__(self, context: Context):
        value, dots = context.student
        dot = dots.x0[0]
        t_B = uniform_timesteps(context, self.low, self.high)
        alpha, _ = context.schedule.alpha_sigma(t_B)
        x_t = sg(add_noise(context.schedule, value.x0, context.normal("eps"), t_B))
        dx = sg(expand(alpha, dot) * dot)
        _, real = tangent(lambda x: context.teacher(x, t_B).x0, x_t, dx)
        _, fake = tangent(lambda x: context.critic(x, t_B).x0, x_t, dx)
        loss_B = pseudo_loss(dot, sg(fake - real), mean_abs(sg(dot) - real))
        return loss_B, {"gap": jnp.mean(jnp.abs(fake - real))}
