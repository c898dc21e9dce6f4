"""Consistency distillation (CD): one x0 from two neighbouring points of the teacher's ODE."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.schedules import add_noise
from gadjax.errors import check_choice
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import (
    TARGETS,
    check_count,
    check_huber,
    sg,
    square_or_huber,
    target_params,
    teacher_step,
)
from gadjax.objectives.compose import Addable
from gadjax.types import expand


@dataclass(frozen=True)
class ConsistencyDistillation(Addable):
    """mean H(S(x_t) - S'(x_r)), x_r one guided DDIM/Euler step of the teacher from x_t to r < t.

    (Song et al. 2023, arXiv 2303.01469, algorithm 2.) x_t = alpha x0 + sigma eps of the data's x0
    and the batch's noise. t and r are neighbours on a grid of `points` intervals, even in time
    between the student's first time and the clean end, where x_r is itself the target: t is
    uniform over the points. S' is the average of the student's parameters (`target="ema"`, the
    paper's), or the student ("student", as iCT and ECT have it). H is the square, or with
    `huber` c > 0 sqrt(d^2 + c^2) - c elementwise, as in LCM (arXiv 2310.04378, c = 0.001).
    Teacher and S' are stop-gradiented. There is no boundary function: S' is not evaluated at the
    clean end, where it would be x. The student learns the run's guidance.
    The student learns the end of the teacher's ODE from any time, and is sampled with fresh noise
    (student.rollout). Cost: 2 evaluations of the student, one with gradient; 2 of the teacher.
    """

    points: int = 50
    huber: float = 0.0
    target: str = "ema"

    def __post_init__(self):
        check_choice("objective.cd.target", self.target, TARGETS)
        check_count("cd", "points", self.points, 2)
        check_huber("cd", self.huber)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=True, images=True, ema=self.target == "ema")

    def __call__(self, context: Context):
        batch, schedule = context.batch, context.schedule
        span = (context.times[0] - schedule.clean) / self.points
        point_B = jnp.floor(context.uniform("t") * self.points)
        r_B = schedule.clean + point_B * span
        x_t = add_noise(schedule, batch.x0, batch.noise, r_B + span)
        x_r = teacher_step(context, x_t, r_B + span, r_B)
        noised_B = jnp.maximum(r_B, schedule.clean + schedule.spacing)
        x0_r = context.denoiser(target_params(context, self), x_r, noised_B, batch.cond).x0
        target = sg(jnp.where(expand(point_B == 0, x_r), x_r, x0_r))
        error = context.denoiser(context.student_params, x_t, r_B + span, batch.cond).x0 - target
        return square_or_huber(error, self.huber), {}
