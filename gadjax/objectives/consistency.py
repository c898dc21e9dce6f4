"""Continuous-time consistency (sCM): one x0 from every point of the teacher's ODE."""

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
    x_a = x_t / sqrt(alpha^2 + sigma^2), a network's F is cos a eps - sin a x0, and
      g = -cos^2 a (F - F_T) - (cos a sin a x_a + dF/ds),  s = log tan a = log(sigma / alpha),
    dF/ds exact, by one jax.jvp in (x, t) along the teacher, whose value is the F of the loss: the
    student is evaluated once. g is stop-gradiented, so no reverse pass goes through the tangent.
    |g| is the root of its mean square, so that 0.1 means the same for every size of latent.
    a is uniform and the weight 1: with those, whatever the schedule calls its times, dF = g shrinks
    E|F - F*|^2 over the teacher's trajectories, F* being the exact one. sCM's learnt variance is
    not used. warmup: student updates over which g's second part grows from 0 to its size, r =
    min(1, step / warmup) times it (sCM, algorithm 1: 10,000; SANA-Sprint: 4,000); 0 for r = 1.

    x_t is a point of the teacher's own rollout from z in `steps` DDIM/Euler steps, without pictures
    (TBCM, arXiv 2511.20410); with images=True the data's x0 with the batch's noise. The student
    learns the end of the teacher's ODE from any time: a one-step map. dF/ds is as rough as the
    network's features of time (sCM, section 4.1): PixArt's turn by a radian a unit.
    Cost: 1 evaluation of the student with a tangent, 2 of the teacher, 2 * steps for its rollout.
    """

    images: bool = False
    steps: int = 8
    warmup: int = 0

    def __post_init__(self):
        if self.warmup < 0:
            raise InputError(
                f"objective.consistency.warmup: found {self.warmup}; expected 0 or more"
            )
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

        ramp = jnp.minimum(1, context.step / self.warmup) if self.warmup else None
        student_velocity, g = velocity_and_update(
            student, context.teacher(x, t_B), context.schedule, x, t_B, ramp
        )
        size_B = jnp.sqrt(sample_mean(g**2))
        loss_B = sample_mean(
            (student_velocity - sg(student_velocity + g / expand(size_B + FLOOR, g))) ** 2
        )
        return loss_B, {"tangent": jnp.mean(size_B)}

    def latents(self, context: Context, t_B):
        """Points x_t of the teacher's rollout, or noised latents of the data."""
        batch = context.batch
        if self.images:
            return add_noise(context.schedule, batch.x0, batch.noise, t_B)
        grid = interpolate_times(jnp.full_like(t_B, context.times[0]), t_B, self.steps)
        return rollout(context.teacher, context.schedule, batch.noise, grid).end


def uniform_angle(context: Context):
    """Times [B], uniform in atan2(sigma, alpha), from the first noised to the student's first."""
    schedule = context.schedule
    first = schedule.clean + schedule.spacing
    knots = np.append(np.arange(first, context.times[0], schedule.spacing), context.times[0])
    alpha, sigma = schedule.alpha_sigma(knots)
    angles = np.arctan2(sigma, alpha)
    angle_B = angles[0] + context.uniform("angle") * (angles[-1] - angles[0])
    return jnp.interp(angle_B, angles, knots)


def velocity(pred: Prediction, alpha, sigma):
    """F = cos a eps - sin a x0, the derivative of x_a with respect to the angle a."""
    length = jnp.sqrt(alpha**2 + sigma**2)
    return expand(alpha / length, pred.eps) * pred.eps - expand(sigma / length, pred.x0) * pred.x0


def velocity_and_update(
    student: Callable, real: Prediction, schedule: NoiseSchedule, x, t_B, ramp=None
):
    """The student's F and the update direction g at x, both [B, H, W, C].

    Args:
      student: (x_BHWC, t_B) -> Prediction.
      real: the teacher's prediction at x.
      schedule: noise schedule.
      x: latents x_t [B, H, W, C].
      t_B: their times.
      ramp: factor of g's second part; None for 1.
    """
    one = jnp.ones_like(t_B)
    (alpha, sigma), (d_alpha, d_sigma) = jax.jvp(schedule.alpha_sigma, (t_B,), (one,))
    pace = alpha * sigma / (alpha * d_sigma - sigma * d_alpha)  # dt/ds
    dx = expand(pace * d_alpha, x) * real.x0 + expand(pace * d_sigma, x) * real.eps

    def student_velocity(x, t_B):
        return velocity(student(x, t_B), *schedule.alpha_sigma(t_B))

    value, ds = tangent(lambda x_and_t: student_velocity(*x_and_t), (x, t_B), (dx, pace))
    square = alpha**2 + sigma**2
    cos_cos, cos_sin = expand(alpha**2 / square, x), expand(alpha * sigma / square, x)
    g = -cos_cos * (value - velocity(real, alpha, sigma))
    second = cos_sin * x / expand(jnp.sqrt(square), x) + ds
    return value, g - (second if ramp is None else ramp * second)
