"""Trajectory-segmented consistency distillation (TSCD) of Hyper-SD."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.errors import InputError, check_choice, short_repr
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import (
    TARGETS,
    check_count,
    ode_step,
    sg,
    target_params,
    teacher_step,
)
from gadjax.objectives.compose import Addable
from gadjax.objectives.consistency import points_of_ode
from gadjax.types import expand


@dataclass(frozen=True)
class TSCD(Addable):
    """mean |jump(S(x_t), s) - sg jump(S'(x_r), s)|^2, s the end of the segment that t and r are in.

    (Hyper-SD, arXiv 2404.13686.) The time from the student's first to the clean end is
    cut into k equal segments, k = `segments` by equal parts of the run (8, 4, 2, 1).
    jump(S, s) = alpha_s x0_S + sigma_s eps_S is the student's DDIM/Euler step to s, and x_r one
    guided step of the teacher from x_t to the next of `points` equal times. At r = s the target is
    x_r; t is uniform over the points. With k segments the student is taught the teacher's map in k
    steps of the ODE, with the last k = 1 the map to x0 from every time (then it is sampled with
    fresh noise, or in one step). Teacher and S' are stop-gradiented; S' is the student, or its
    average (`target`).
    x_t is the data's x0 with the batch's noise (`images`), or else a point of the teacher's
    rollout from z in `steps` steps, without pictures.
    Not here: the adversarial loss of the late stages (sum it with `adversarial`), human feedback,
    one LoRA for all numbers of steps, the score distillation of one step (sum it with `dmd`), and
    the weights of the authors' code, which is not public.
    Cost: 2 evaluations of the student, one with gradient; 2 of the teacher; 2 * steps for a
    rollout.
    """

    segments: tuple[int, ...] = (8, 4, 2, 1)
    points: int = 48
    images: bool = True
    steps: int = 8
    target: str = "student"

    def __post_init__(self):
        check_choice("objective.tscd.target", self.target, TARGETS)
        check_count("tscd", "points", self.points, 2)
        check_count("tscd", "steps", self.steps, 1)
        counts = [k for k in self.segments if isinstance(k, int) and k > 0 == self.points % k]
        if not self.segments or len(counts) < len(self.segments):
            raise InputError(
                f"objective.tscd.segments: found {short_repr(self.segments)}; expected numbers of "
                f"segments that divide the {self.points} points"
            )

    @property
    def needs(self) -> Needs:
        return Needs(teacher=True, images=self.images, ema=self.target == "ema")

    def check(self, times: Sequence[float]) -> None:
        last = self.segments[-1]
        if last not in (1, len(times)):
            raise InputError(
                f"objective.tscd.segments: found {last} at the end; expected 1 or the student's "
                f"{len(times)} steps"
            )
        even = [times[0] * (1 - k / len(times)) for k in range(len(times))]
        off = max(abs(t - e) for t, e in zip(times, even, strict=True))
        if last > 1 and off > 0.002 * times[0]:  # the clean end may be a unit below 0
            raise InputError(
                f"student.timesteps: found {short_repr(times)}; expected even ones, at which the "
                f"{last} segments of objective.tscd start"
            )

    def __call__(self, context: Context):
        schedule = context.schedule
        start = schedule.clean
        span = (context.times[0] - start) / self.points
        r_point_B = jnp.floor(context.uniform("t") * self.points)
        end_point_B = self.segment_end(context, r_point_B)
        t_B, r_B, end_B = (start + n_B * span for n_B in (r_point_B + 1, r_point_B, end_point_B))

        def jump(params, x, t_B):
            prediction = context.denoiser(params, x, t_B, context.batch.cond)
            return ode_step(schedule, prediction, end_B)

        x_t = sg(points_of_ode(context, t_B, self.images, self.steps))
        x_r = teacher_step(context, x_t, t_B, r_B)
        noised_B = jnp.maximum(r_B, start + schedule.spacing)
        jumped = jump(target_params(context, self), x_r, noised_B)
        target = sg(jnp.where(expand(r_point_B == end_point_B, x_r), x_r, jumped))
        return sample_mean((jump(context.student_params, x_t, t_B) - target) ** 2), {}

    def segment_end(self, context: Context, point_B):
        """Index [B] of the point at which the segment of a point ends, at the stage of the clock.

        A point is in the segment above it.
        """
        count = len(self.segments)
        stage = jnp.clip(jnp.floor(context.share * count), 0, count - 1).astype(int)
        length = jnp.asarray([self.points // k for k in self.segments])[stage]
        return jnp.floor(point_B / length) * length
