"""MeanFlow distillation: the mean of the teacher's velocity over each step of the student."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.geometry import tangent
from gadjax.diffusion.schedules import Flow
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import check_count, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.consistency import points_of_ode, warmup_ramp
from gadjax.types import Prediction, expand

ERROR_FLOOR = 1e-3  # c of the adaptive weight


@dataclass(frozen=True)
class MeanFlow(Addable):
    """e / sg(e + c)^p, e = mean|u(x_t) - sg[v - (t - r) du/dt]|^2, v = T_w's velocity at x_t.

    MeanFlow (arXiv 2505.13447) as a distillation: u is the mean velocity from t down to r, so that
    x_r = x_t - (t - r) u is a step of any length, and du/dt its exact derivative along the
    teacher's guided ODE, by one jax.jvp in (x, t) with (v, 1), whose value is the u of the loss. t
    is uniform in one step of the student's grid, drawn as everywhere, and r is the end of that
    step. c = 0.001, p = `power`: 0 is the plain square; with the paper's 1 a student of one step
    did not find all modes of the bench (docs/results/bench.md). The target is stop-gradiented.
    warmup: student updates over which du/dt grows from 0 to its size.
    x_t is the data's x0 with the batch's noise (`images`), or else a point of the teacher's
    rollout from z in `steps` steps, without pictures.
    Only flows. In the paper r is a second input of the network. Here it is a function of t, and the
    network a plain one: of the paper's pairs (t, r) those that a sampler asks for are trained, and
    u jumps at the student's times. The student is sampled on its own grid by the ODE, and exported
    like any other. Not here: other r at sampling; training from pictures without a teacher, for
    which the paper takes r = t in 75 % of the samples; its law of times (logit-normal).
    Cost: 1 evaluation of the student with a tangent, 2 of the teacher; 2 * steps for a rollout.
    """

    images: bool = True
    steps: int = 8
    warmup: int = 0
    power: float = 0.0

    def __post_init__(self):
        check_count("meanflow", "steps", self.steps, 1)
        check_count("meanflow", "warmup", self.warmup, 0)
        if not 0 <= self.power <= 1:
            raise InputError(
                f"objective.meanflow.power: found {self.power}; expected a number from 0 to 1"
            )

    @property
    def needs(self) -> Needs:
        return Needs(teacher=True, jvp=True, images=self.images)

    def check_denoiser(self, denoiser: Denoiser) -> None:
        if not isinstance(denoiser.schedule, Flow):
            raise InputError(
                "objective.meanflow: found a teacher with the schedule "
                f"{type(denoiser.schedule).__name__}; expected a flow"
            )

    def __call__(self, context: Context):
        r_B = context.next_B
        t_B = r_B + (context.t_B - r_B) * (1 - context.uniform("t"))  # not r itself
        x = sg(points_of_ode(context, t_B, self.images, self.steps))
        v = flow_velocity(context.teacher(x, t_B))

        def student(x, t):
            return context.denoiser(context.student_params, x, t, context.batch.cond)

        unit = context.schedule.steps  # times are in units of 1 / steps
        u, rate = mean_velocity(student, x, t_B, v, unit)
        ramp = warmup_ramp(context, self.warmup)
        target = v - expand((t_B - r_B) / unit, x) * (rate if ramp is None else ramp * rate)
        error_B = sample_mean((u - sg(target)) ** 2)
        loss_B = error_B / sg(error_B + ERROR_FLOOR) ** self.power
        return loss_B, {"error": jnp.mean(error_B)}


def mean_velocity(student: Callable, x, t_B, v, unit: float):
    """u and du/dt of the student along (v, 1), both [B, H, W, C]; t from 0 to 1.

    Args:
      student: (x_BHWC, t_B) -> Prediction.
      x: latents x_t.
      t_B: their times.
      v: the teacher's velocity at x.
      unit: times from clean to noise.
    """

    def u(x_and_t):
        return flow_velocity(student(*x_and_t))

    return tangent(u, (x, t_B), (v, jnp.full_like(t_B, unit)))


def flow_velocity(pred: Prediction):
    """eps - x0, the derivative of x with respect to sigma on a flow."""
    return pred.eps - pred.x0
