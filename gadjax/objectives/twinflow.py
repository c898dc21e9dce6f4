"""TwinFlow: distribution matching whose critic is the student at negative times."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.meanflow import flow_velocity
from gadjax.objectives.time_laws import uniform_timesteps

SCALE = 1e-3  # c of the code's robust loss
CLAMP = 1.0  # of the velocities' difference, in the code


@dataclass(frozen=True)
class TwinFlow(Addable):
    """rho|u(x_s, -s) - (eps - x0)| + `match` rho|u - sg[u - clip(u(x_t, -t) - v_T(x_t, t))]|.

    (arXiv 2512.05150.) u is the student's velocity at its drawn step, x0 its prediction there. At
    negative times the same network is asked for the velocity of its own samples, so that it is its
    own critic: no second network is trained or held. The step of u in the second part is DMD's,
    along v_T - u, v_T the teacher's guided velocity, and clipped to 1. s and t are uniform over the
    span, x_s = (1 - s) x0 + s eps, x_t likewise, with noises of their own. rho(d) = m / sqrt(m /
    c^2 + 1) / c of the mean square m of d, c = 0.001, its root stop-gradiented (the code's loss):
    near |d|, so that no sample outweighs the others. `match`: 0.5 in the code.
    x0 in both, and the two velocities of the second part, are stop-gradiented.
    The paper's network has a second time as input, and so is a multi-step model of the data too,
    whose own u(x_t, t) takes v_T's place. Networks here have one time, at which a few-step student
    can have one velocity alone: v_T is the teacher's, and the any-step part of the paper is another
    term of the sum (`meanflow`). Not here: guidance from the student itself (enhanced targets).
    Cost: 2 evaluations of the student, one of them with gradient, beside the drawn step; 2 of the
    teacher. Only flows.
    """

    match: float = 0.5

    needs = Needs(student=True, teacher=True)

    def __post_init__(self):
        if not 0 <= self.match < float("inf"):
            raise InputError(f"objective.twinflow.match: found {self.match}; expected 0 or more")

    def check_denoiser(self, denoiser: Denoiser) -> None:
        if denoiser.parameterization != "flow":
            raise InputError(
                f"objective.twinflow: found a teacher that predicts {denoiser.parameterization}; "
                "expected a flow, whose output has a meaning at negative times"
            )

    def __call__(self, context: Context):
        x0, drawn = sg(context.student[0].x0), flow_velocity(context.student[0])
        self_B = self.negative(context.with_stream("own"), x0)
        other = context.with_stream("match")
        t_B = uniform_timesteps(other, 0.0, 1.0)
        x_t = add_noise(context.schedule, x0, other.normal("eps"), t_B)
        gap = self.velocity(context, x_t, -t_B) - flow_velocity(context.teacher(x_t, t_B))
        goal = sg(drawn - jnp.clip(gap, -CLAMP, CLAMP))
        match_B = robust(sample_mean((drawn - goal) ** 2))
        metrics = {"self": jnp.mean(self_B), "gap": jnp.mean(jnp.abs(gap))}
        return robust(self_B) + self.match * match_B, metrics

    def negative(self, context: Context, x0):
        """Mean square error [B] of the student's velocity at negative times on its own samples."""
        t_B, eps = uniform_timesteps(context, 0.0, 1.0), context.normal("eps")
        x_t = add_noise(context.schedule, x0, eps, t_B)
        return sample_mean((self.velocity(context, x_t, -t_B) - (eps - x0)) ** 2)

    def velocity(self, context: Context, x_t, t_B):
        """The student's raw output [B, H, W, C], at any time."""
        return context.denoiser.raw(context.student_params, x_t, t_B, context.batch.cond)


def robust(square_B):
    """m / sqrt(m / c^2 + 1) / c, its root stop-gradiented."""
    weight_B = sg(1 / jnp.sqrt(square_B / (SCALE**2 + 1e-8) + 1))
    return square_B * weight_B / SCALE
