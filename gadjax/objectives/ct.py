"""Consistency training (CT): one x0 from two noise levels of a picture, without a teacher."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.diffusion.schedules import NoiseSchedule, add_noise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import check_count, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import check_log_normal, log_normal_times, times_at_ratio
from gadjax.types import expand


@dataclass(frozen=True)
class CT(Addable):
    """mean (sqrt(mean|S(x_t) - sg S(x_r)|^2 + c^2) - c) / (u_t - u_r), u = sigma / alpha.

    Improved consistency training (iCT, arXiv 2310.14189) in ECT's form (arXiv 2406.14548). x_t and
    x_r are one picture x0 with one noise, alpha x0 + sigma eps at both. log u_t is normal with
    `mean` and `std`, and
      u_r = u_t (1 - (1 + 8 sigmoid(-u_t)) / factor^(k + 1)), k = 0 ... `stages` - 1 by the clock:
    in stage 0 most u_r are below the first noise, where x0 itself is the target and CT is denoising
    from the teacher's weights; each stage then divides the gaps by `factor`. c = `huber`: iCT's
    0.00054 for the mean over elements in place of the norm, by whose root of their number the loss
    is smaller than the papers'. S(x_r) is stop-gradiented, and of the student itself: no average.
    Guidance: the pictures have none, and neither paper has a guided loss; `guidance` of the run is
    not used, and the student draws what the data are for a caption. The teacher gives the start
    alone: it is neither evaluated nor kept in memory. The student is sampled with fresh noise
    (student.rollout).
    Not here: iCT's grid of 10 to 1280 levels (ECT's gaps are continuous), dropout shared by both
    evaluations (networks have none here), other distances.
    Cost: 2 evaluations of the student, one with gradient.
    """

    mean: float = -1.1
    std: float = 2.0
    stages: int = 8
    factor: float = 2.0
    huber: float = 5.4e-4

    needs = Needs(images=True, few_step=True)

    def __post_init__(self):
        check_count("ct", "stages", self.stages, 1)
        check_log_normal("ct", self.mean, self.std)
        for name, least in (("factor", 1), ("huber", 0)):
            value = getattr(self, name)
            if not least < value < float("inf"):
                raise InputError(f"objective.ct.{name}: found {value}; expected more than {least}")

    def __call__(self, context: Context):
        loss_B, size_B, clean_B = self.losses_at(
            context, log_normal_times(context, self.mean, self.std)
        )
        return loss_B, {"error": jnp.mean(size_B), "denoising": jnp.mean(clean_B)}

    def losses_at(self, context: Context, t_B):
        """Losses [B] at times t_B, their errors, and True where x0 itself is the target."""
        batch, schedule, student = context.batch, context.schedule, context.student_params
        ratio_t_B = noise_ratio(schedule, t_B)
        lower_B = self.lower_ratio(context, ratio_t_B)
        r_B = times_at_ratio(context, lower_B)
        clean_B = lower_B < noise_ratio(schedule, jnp.float32(schedule.clean + schedule.spacing))
        gap_B = ratio_t_B - jnp.where(clean_B, 0, noise_ratio(schedule, r_B))
        x_t, x_r = (add_noise(schedule, batch.x0, batch.noise, t) for t in (t_B, r_B))
        x0_r = self.target(context, x_r, r_B)
        target = sg(jnp.where(expand(clean_B, x_r), batch.x0, x0_r))
        error = context.denoiser(student, x_t, t_B, batch.cond).x0 - target
        size_B = jnp.sqrt(sample_mean(error**2) + self.huber**2) - self.huber
        gap_B = jnp.maximum(gap_B, 1e-6)  # 0 where pure noise leaves no room for two times
        return size_B / gap_B, size_B, clean_B

    def target(self, context: Context, x_r, r_B):
        """x0 that S(x_t) is to equal: the student's own at x_r."""
        return context.denoiser(context.student_params, x_r, r_B, context.batch.cond).x0

    def lower_ratio(self, context: Context, ratio_B):
        """u_r [B] of u_t: ECT's mapping, at the stage of the clock."""
        stage = jnp.clip(jnp.floor(context.share * self.stages), 0, self.stages - 1)
        adjust_B = 1 + 8 * jax.nn.sigmoid(-ratio_B)
        return ratio_B * jnp.maximum(1 - adjust_B / self.factor ** (stage + 1), 0)


def noise_ratio(schedule: NoiseSchedule, t_B):
    """sigma / alpha at times, finite at pure noise."""
    alpha, sigma = schedule.alpha_sigma(t_B)
    return sigma / jnp.maximum(alpha, 1e-6)
