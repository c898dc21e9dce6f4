"""Continuous-time consistency (sCM): one x0 from every point of the teacher's ODE."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gadjax.diffusion.geometry import tangent
from gadjax.diffusion.rollout import interpolate_times, rollout
from gadjax.diffusion.schedules import NoiseSchedule, add_noise
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import check_bins, check_count, sg, update_bin_means
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import uniform_angle
from gadjax.types import Metrics, Prediction, expand

FLOOR = 0.1  # sCM's c: where g is below it, the loss becomes proportional to g^2
MIN_VARIANCE = 1e-8  # a student without error has a finite loss


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
    E|F - F*|^2 over the teacher's trajectories, F* being the exact one.
    warmup: student updates over which g's second part grows from 0 to its size, r = min(1, step /
      warmup) times it (sCM, algorithm 1: 10,000; SANA-Sprint: 4,000); 0 for r = 1.
    variance_bins: sCM's learnt variance, in so many equal parts of a; 0 for none. The loss e of a
      sample becomes exp(-v) e + v. For a given student its minimum in v(a) is log E[e | a], where
      every time has the same gradient on average, whatever its weight was. Here v is the log of the
      term's running mean of e in the part (a new one counts 1 - `variance_decay`), 0 at first:
      that minimum, up to the means' lag. sCM and SANA-Sprint train an MLP of the time for it,
      smooth in a and as slow as its learning rate.

    x_t is a point of the teacher's own rollout from z in `steps` DDIM/Euler steps, without pictures
    (TBCM, arXiv 2511.20410); with images=True the data's x0 with the batch's noise. The student
    learns the end of the teacher's ODE from any time: a one-step map. dF/ds is as rough as the
    network's features of time (sCM, section 4.1): PixArt's turn by a radian a unit.
    Cost: 1 evaluation of the student with a tangent, 2 of the teacher, 2 * steps for its rollout.
    """

    images: bool = False
    steps: int = 8
    warmup: int = 0
    variance_bins: int = 0
    variance_decay: float = 0.99

    def __post_init__(self):
        check_bins("consistency", "variance_", self.variance_bins, self.variance_decay)
        check_count("consistency", "warmup", self.warmup, 0)
        check_count("consistency", "steps", self.steps, 1)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=True, jvp=True, images=self.images)

    def __call__(self, context: Context):
        t_B = uniform_angle(context)
        x = sg(self.latents(context, t_B))

        def student(x, t):
            return context.denoiser(context.student_params, x, t, context.batch.cond)

        real, ramp = context.teacher(x, t_B), warmup_ramp(context, self.warmup)
        pair = velocity_and_update(student, real, context.schedule, x, t_B, ramp)
        loss_B, size_B = normalized_update_loss(*pair)
        metrics = {"tangent": jnp.mean(size_B)}
        if self.variance_bins:
            bin_B = jnp.floor(context.uniform("angle") * self.variance_bins).astype(jnp.int32)
            metrics |= {"error_B": sg(loss_B), "bin_B": bin_B}
            variance_B = jnp.maximum(context.memory[bin_B], MIN_VARIANCE)
            loss_B = loss_B / variance_B + jnp.log(variance_B)
        return loss_B, metrics

    def init_memory(self):
        """Means of the loss in the parts of the angle; None without them."""
        return jnp.ones(self.variance_bins) if self.variance_bins else None

    def remember(self, memory, metrics: Metrics):
        errors = metrics["error_B"], metrics["bin_B"]
        return update_bin_means(memory, *errors, self.variance_decay)

    def latents(self, context: Context, t_B):
        """Points x_t of the teacher's rollout, or noised latents of the data."""
        return points_of_ode(context, t_B, self.images, self.steps)


def points_of_ode(context: Context, t_B, images: bool, steps: int):
    """Points x_t [B, H, W, C] of the teacher's guided ODE.

    Args:
      context: networks and batch.
      t_B: their times [B].
      images: x_t is the data's x0 with the batch's noise; else the end of the teacher's rollout
        from z.
      steps: DDIM/Euler steps of that rollout.
    """
    batch = context.batch
    if images:
        return add_noise(context.schedule, batch.x0, batch.noise, t_B)
    grid = interpolate_times(jnp.full_like(t_B, context.times[0]), t_B, steps)
    return rollout(context.teacher, context.schedule, batch.noise, grid).end


def warmup_ramp(context: Context, warmup: int):
    """Factor min(1, step / warmup) of g's second part; None, for 1, without a warm-up."""
    return jnp.minimum(1, context.step / warmup) if warmup else None


def normalized_update_loss(student_velocity, g):
    """mean |F - sg[F + g / (rms(g) + 0.1)]|^2 and rms(g), each [B]."""
    size_B = jnp.sqrt(sample_mean(g**2))
    goal = sg(student_velocity + g / expand(size_B + FLOOR, g))
    return sample_mean((student_velocity - goal) ** 2), size_B


def velocity(pred: Prediction, alpha, sigma):
    """F = cos a eps - sin a x0, the derivative of x_a with respect to the angle a."""
    length = jnp.sqrt(alpha**2 + sigma**2)
    return expand(alpha / length, pred.eps) * pred.eps - expand(sigma / length, pred.x0) * pred.x0


class Velocities(NamedTuple):
    """F of student and teacher at x_t, and the student's derivative along the teacher's ODE.

    Attributes:
      student, teacher: F [B, H, W, C].
      rate: dF/ds of the student, s = log(sigma / alpha).
      alpha, sigma: levels [B] of x_t.
    """

    student: jax.Array
    teacher: jax.Array
    rate: jax.Array
    alpha: jax.Array
    sigma: jax.Array


def velocities(student: Callable, real: Prediction, schedule: NoiseSchedule, x, t_B) -> Velocities:
    """Velocities at x_t, in one evaluation of the student with its tangent.

    Args:
      student: (x_BHWC, t_B) -> Prediction.
      real: the teacher's prediction at x.
      schedule: noise schedule.
      x: latents x_t [B, H, W, C].
      t_B: their times.
    """
    one = jnp.ones_like(t_B)
    (alpha, sigma), (d_alpha, d_sigma) = jax.jvp(schedule.alpha_sigma, (t_B,), (one,))
    pace = alpha * sigma / (alpha * d_sigma - sigma * d_alpha)  # dt/ds
    dx = expand(pace * d_alpha, x) * real.x0 + expand(pace * d_sigma, x) * real.eps

    def student_velocity(x, t_B):
        return velocity(student(x, t_B), *schedule.alpha_sigma(t_B))

    value, rate = tangent(lambda x_and_t: student_velocity(*x_and_t), (x, t_B), (dx, pace))
    return Velocities(value, velocity(real, alpha, sigma), rate, alpha, sigma)


def velocity_and_update(
    student: Callable, real: Prediction, schedule: NoiseSchedule, x, t_B, ramp=None
):
    """The student's F and sCM's update direction g at x, both [B, H, W, C].

    Args:
      student, real, schedule, x, t_B: as for `velocities`.
      ramp: factor of g's second part; None for 1.
    """
    value, teacher, rate, alpha, sigma = velocities(student, real, schedule, x, t_B)
    square = alpha**2 + sigma**2
    cos_cos, cos_sin = expand(alpha**2 / square, x), expand(alpha * sigma / square, x)
    g = -cos_cos * (value - teacher)
    second = cos_sin * x / expand(jnp.sqrt(square), x) + rate
    return value, g - (second if ramp is None else ramp * second)
