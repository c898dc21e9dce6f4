"""Continuous-time consistency: one x0 from every point of the teacher's ODE."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.diffusion.geometry import tangent
from gadjax.diffusion.rollout import interpolate_times, rollout
from gadjax.diffusion.schedules import NoiseSchedule, add_noise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import sg
from gadjax.objectives.compose import Addable
from gadjax.types import Prediction, expand

FLOOR = 0.1  # sCM's c: where g is below it, the loss becomes proportional to g^2


@dataclass(frozen=True)
class Consistency(Addable):
    """mean |F - sg[F + g / (rms(g) + 0.1)]|^2, g = cos a dx0_S/da along the teacher's guided ODE.

    sCM (arXiv 2410.11081, algorithm 1) in any schedule. With the angle a = atan2(sigma, alpha) and
    x_a = x_t / sqrt(alpha^2 + sigma^2), a network says F = cos a eps - sin a x0, and
      g = -cos^2 a (F - F_T) - (cos a sin a x_a + dF/ds),  s = log tan a = log(sigma / alpha),
    dF/ds exact, by one jax.jvp in (x, t) along the teacher, whose value is the F of the loss: the
    student is evaluated once. g is stop-gradiented, so no reverse pass goes through the tangent.
    |g| is the root of its mean square, so that 0.1 means the same for every size of latent.
    a is uniform and the weight 1: with those, whatever the schedule calls its times, dF = g shrinks
    E|F - F*|^2 over the teacher's trajectories, F* being the exact one. sCM's learnt variance is
    left out, and so is its warm-up of g's second part, since a term does not know its step.

    x_t is a point of the teacher's own walk from z in `steps` DDIM/Euler steps, without any picture
    (TBCM, arXiv 2511.20410); with images=True the data's x0 with the batch's noise. What is learnt
    is where the teacher's ODE ends, from any time: a map for one step. dF/ds is as rough as the
    network's features of time (sCM, section 4.1): PixArt's turn by a radian a unit.
    Cost: 1 evaluation of the student with a tangent, 2 of the teacher, 2 * steps for its walk.
    """

    images: bool = False
    steps: int = 8

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"objective.consistency.steps: found {self.steps}; expected 1 or more")

    @property
    def needs(self) -> Needs:
        return Needs(teacher=True, jvp=True, images=self.images)

    def __call__(self, context: Context):
        t_B = uniform_angle(context)
        x = sg(self.latents(context, t_B))

        def student(x, t):
            return context.denoiser(context.student_params, x, t, context.batch.cond)

        said, g = along(student, context.teacher(x, t_B), context.schedule, x, t_B)
        size_B = jnp.sqrt(sample_mean(g**2))
        loss_B = sample_mean((said - sg(said + g / expand(size_B + FLOOR, g))) ** 2)
        return loss_B, {"tangent": jnp.mean(size_B)}

    def latents(self, context: Context, t_B):
        batch = context.batch
        if self.images:
            return add_noise(context.schedule, batch.x0, batch.noise, t_B)
        grid = interpolate_times(jnp.full_like(t_B, context.times[0]), t_B, self.steps)
        return rollout(context.teacher, context.schedule, batch.noise, grid).end


def uniform_angle(context: Context):
    """Times from the first noised one to the student's first, uniform in atan2(sigma, alpha)."""
    schedule = context.schedule
    first = schedule.clean + schedule.spacing
    knots = np.append(np.arange(first, context.times[0], schedule.spacing), context.times[0])
    alpha, sigma = schedule.alpha_sigma(knots)
    angles = np.arctan2(sigma, alpha)
    angle_B = angles[0] + context.uniform("angle") * (angles[-1] - angles[0])
    return jnp.interp(angle_B, angles, knots)


def velocity(said: Prediction, alpha, sigma):
    """F = cos a eps - sin a x0, the speed of x_a in the angle."""
    length = jnp.sqrt(alpha**2 + sigma**2)
    return expand(alpha / length, said.eps) * said.eps - expand(sigma / length, said.x0) * said.x0


def along(student: Callable, real: Prediction, schedule: NoiseSchedule, x, t_B):
    """The student's F and g at x, where the teacher says `real`."""
    one = jnp.ones_like(t_B)
    (alpha, sigma), (d_alpha, d_sigma) = jax.jvp(schedule.alpha_sigma, (t_B,), (one,))
    pace = alpha * sigma / (alpha * d_sigma - sigma * d_alpha)  # dt/ds
    dx = expand(pace * d_alpha, x) * real.x0 + expand(pace * d_sigma, x) * real.eps

    def here(x, t_B):
        return velocity(student(x, t_B), *schedule.alpha_sigma(t_B))

    said, ds = tangent(lambda at: here(*at), (x, t_B), (dx, pace))
    square = alpha**2 + sigma**2
    cos_cos, cos_sin = expand(alpha**2 / square, x), expand(alpha * sigma / square, x)
    g = -cos_cos * (said - velocity(real, alpha, sigma))
    return said, g - (cos_sin * x / expand(jnp.sqrt(square), x) + ds)
