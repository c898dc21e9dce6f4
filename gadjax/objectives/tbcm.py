"""Trajectory-backward consistency (TBCM): sCM on all points of the teacher's own trajectory."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.diffusion.rollout import rollout
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import check_count, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.consistency import (
    normalized_update_loss,
    velocity_and_update,
    warmup_ramp,
)
from gadjax.objectives.time_laws import times_at_share


@dataclass(frozen=True)
class TBCM(Addable):
    """mean over n points x_t of one rollout of sCM's |F - sg[F + g / (rms(g) + 0.1)]|^2.

    (arXiv 2511.20410.) F and g are those of `Consistency`. The teacher's guided ODE is integrated
    once from z, in DDIM/Euler steps from the student's first time through n = `points` times, one
    in each of n equal parts of the angle a = atan2(sigma, alpha), where it is uniform. The
    prediction that leads from x_t to the next point is also the F_T of g at x_t, so that no point
    costs the teacher more than one guided evaluation. As in the code, the start itself is not in
    the loss. No pictures and no autoencoder. g and all of the teacher are stop-gradiented.
    warmup: as in `Consistency` (the code: 4,000).
    Not here: the code's route, even in SANA's shifted sigma in place of the angle; its weight
    1 / tan a with sCM's learnt variance; guidance embedded in the network (4, 4.5 or 5); the filter
    of rollouts that end in black pictures.
    Cost for each sample: 2 (n + 1) teacher evaluations, and n of the student with a tangent, in one
    batch of n times as many samples: n times the memory of `Consistency` for the student's
    activations, which microbatches divide.
    """

    points: int = 15
    warmup: int = 0

    needs = Needs(teacher=True, jvp=True)

    def __post_init__(self):
        check_count("tbcm", "points", self.points, 1)
        check_count("tbcm", "warmup", self.warmup, 0)

    def __call__(self, context: Context):
        t_B, x, real = sg(jax.tree.map(merge_points, self.trajectory(context)))
        cond = context.batch.cond.map(lambda v: jnp.repeat(v, self.points, axis=0))

        def student(x, t):
            return context.denoiser(context.student_params, x, t, cond)

        ramp = warmup_ramp(context, self.warmup)
        pair = velocity_and_update(student, real, context.schedule, x, t_B, ramp)
        loss_B, size_B = normalized_update_loss(*pair)
        return loss_B.reshape(-1, self.points).mean(1), {"tangent": jnp.mean(size_B)}

    def trajectory(self, context: Context):
        """Times [n, B] of the points, the points, and the teacher's predictions there."""
        z, schedule = context.batch.noise, context.schedule
        parts = range(self.points - 1, -1, -1)
        shares = [(k + context.uniform(f"angle/{k}")) / self.points for k in parts]
        t_NB = times_at_share(context, jnp.stack(shares))
        start_1B = jnp.full_like(t_NB[:1], context.times[0])
        end_1B = jnp.full_like(start_1B, schedule.clean)
        grid = jnp.concatenate([start_1B, t_NB, end_1B])
        x, prediction, _ = rollout(context.teacher, schedule, z, grid)
        return t_NB, x[1:], jax.tree.map(lambda v: v[1:], prediction)


def merge_points(x):
    """[n, B, ...] as [B * n, ...]: all points of a sample stay on its devices."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
