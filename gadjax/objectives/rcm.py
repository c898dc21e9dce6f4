"""Score-regularised consistency (rCM): its continuous-time consistency part."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import check_count, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.consistency import (
    FLOOR,
    Velocities,
    points_of_ode,
    velocities,
    warmup_ramp,
)
from gadjax.objectives.time_laws import check_log_normal, log_normal_times
from gadjax.types import expand

SCALE = 100.0  # of the code, beside 1 for distribution matching


@dataclass(frozen=True)
class RCM(Addable):
    """100 mean|F - sg[F + g / (|g| + 0.1)]|^2, to be summed with `dmd` on the same student.

    (arXiv 2510.08431.) With F, F_T, the angle a and dF/ds as in `Consistency`,
      g = -cos a sqrt(1 - r^2 sin^2 a) (F - F_T) - (r cos a sin a x_a + dF/ds),
    r = min(1, step / `warmup`) (the code: 1,000; 0 for r = 1), which, other than in sCM, is not on
    dF/ds; at r = 1 it is sCM's g. |g| is the norm over all elements, so that the update does not
    grow with the latent; sCM's weight of time and learnt variance are not used. log tan a is normal
    with `mean` and `std` (the code: 0.7 and 1.6 for its network of 1.3B, 1.5 for that of 14B).
    The authors' network predicts a velocity: F, up to a factor between 1 and sqrt(2). That of a
    network that predicts eps is eps / cos a and a part of x, so that an update of one size in F is
    1 / cos a times as steep in the output: 21 at the last time of the bundled eps teacher, where
    the student diverged. Its loss is measured in the output here: cos^2 a times the one above, and
    sin^2 a times for a network that predicts x0.
    x_t is the data's x0 with the batch's noise (`images`; the authors' data are drawn by the
    teacher), or else a point of the teacher's rollout from z in `steps` steps. g is
    stop-gradiented.
    The other half of rCM is DMD on the student's samples with fresh noise, after the warm-up. The
    code sums both over elements and has no 1/2 in DMD: here both are means, so that its ratio is
    rcm + 2 dmd, which starts with the first update.
    Cost: 1 evaluation of the student with a tangent, 2 of the teacher; 2 * steps for a rollout.
    """

    images: bool = True
    steps: int = 8
    warmup: int = 0
    mean: float = 0.7
    std: float = 1.6

    def __post_init__(self):
        check_count("rcm", "steps", self.steps, 1)
        check_count("rcm", "warmup", self.warmup, 0)
        check_log_normal("rcm", self.mean, self.std)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=True, jvp=True, images=self.images)

    def __call__(self, context: Context):
        t_B = log_normal_times(context, self.mean, self.std)
        x = sg(points_of_ode(context, t_B, self.images, self.steps))

        def student(x, t):
            return context.denoiser(context.student_params, x, t, context.batch.cond)

        real, ramp = context.teacher(x, t_B), warmup_ramp(context, self.warmup)
        pair = velocities(student, real, context.schedule, x, t_B)
        g = regularised_update(pair, x, 1.0 if ramp is None else ramp)
        norm_B = jnp.sqrt(sample_mean(g**2) * g[0].size)
        goal = sg(pair.student + g / expand(norm_B + FLOOR, g))
        weight_B = output_weight(context.denoiser.parameterization, pair.alpha, pair.sigma)
        loss_B = SCALE * weight_B * sample_mean((pair.student - goal) ** 2)
        return loss_B, {"tangent": jnp.mean(norm_B)}


def output_weight(parameterization: str, alpha, sigma):
    """Square [B] of the output's change with F at a given x: cos^2 a for eps, sin^2 a for x0.

    1 for velocities, which are F up to a factor near 1.

    Args:
      parameterization: of the network's output.
      alpha, sigma: levels [B].
    """
    level = {"eps": alpha, "x0": sigma}.get(parameterization)
    return 1.0 if level is None else level**2 / (alpha**2 + sigma**2)


def regularised_update(pair: Velocities, x, ramp):
    """rCM's update direction g of F [B, H, W, C].

    Args:
      pair: velocities at x.
      x: latents x_t.
      ramp: r.
    """
    length = jnp.sqrt(pair.alpha**2 + pair.sigma**2)
    cos, sin = expand(pair.alpha / length, x), expand(pair.sigma / length, x)
    level = jnp.sqrt(jnp.maximum(1 - (ramp * sin) ** 2, 0))  # rounding goes below 0
    first = cos * level * (pair.student - pair.teacher)
    return -first - (ramp * cos * sin * x / expand(length, x) + pair.rate)
