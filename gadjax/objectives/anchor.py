"""Diversity anchor of DP-DMD: the first step regresses to the teacher's from the same noise."""

from collections.abc import Sequence
from dataclasses import dataclass

from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, TeacherMap, map_end, sample_mean
from gadjax.objectives.common import sg
from gadjax.objectives.compose import Addable
from gadjax.types import expand


@dataclass(frozen=True)
class Anchor(Addable):
    """Regression of the first step to a teacher target from the same z; no other term trains it.

    z_k is where the teacher's guided ODE is at time t_k: the end of the student's first
    interval, or `until` (DP-DMD's K: the later on the trajectory, the more of the teacher's image
    is fixed by the first step).
    target="v" (flow models): |v_S - (z - z_k) / (t_1 - t_k)|^2, v = eps - x0 (arXiv 2602.03139).
      For any other schedule the same secant: the (x0, eps) whose straight path passes
      through z and z_k.
    target="x0" (diffusion models): |x0_S(z) - T_w(z_k)|^2.
    Teacher and targets are stop-gradiented. Needs the gradient cut after the first step.
    All samples train it if the student's full rollout is computed anyway (DMD with
    backprop="all"); otherwise those whose drawn step is the first, as also where GAD needs the same
    map, which is then computed once.
    Cost: 2 * steps teacher evaluations for the map; "x0" adds 2.
    """

    target: str = "v"
    steps: int = 0
    until: float | None = None

    def __post_init__(self):
        if self.target not in ("v", "x0"):
            raise InputError(f"objective.anchor.target: found {self.target!r}; expected v or x0")

    @property
    def map(self) -> TeacherMap:
        """Teacher map from z to the anchor's target time."""
        return TeacherMap("next", self.steps, self.until)

    @property
    def needs(self) -> Needs:
        return Needs(first_step=(self.map,), detach_first_step=True)

    def check(self, times: Sequence[float]) -> None:
        if self.until is not None and not 0 < self.until < times[0]:
            raise InputError(
                f"objective.anchor.until: found {self.until}; expected a time between 0 and "
                f"{times[0]}, from which the student starts"
            )

    def __call__(self, context: Context):
        prediction, teacher_end, weight_B = context.first_step[self.map]
        teacher_end, context = sg(teacher_end), context.at_first_step()
        end_B = map_end(context, self.map)
        if self.target == "x0":
            error = prediction.x0 - sg(context.teacher(teacher_end, end_B).x0)
        else:
            x0, eps = secant(context, teacher_end, end_B)
            error = (prediction.eps - prediction.x0) - sg(eps - x0)
        loss_B = sample_mean(error**2)
        return loss_B * weight_B, {}


def secant(context: Context, x_end, end_B):
    """(x0, eps) whose path alpha x0 + sigma eps passes through x_k and `x_end`.

    Args:
      context: x_k and its times.
      x_end: second point of the path [B, H, W, C].
      end_B: its times [B].
    """
    (a, s), (b, r) = (context.schedule.alpha_sigma(t) for t in (context.t_B, end_B))
    x = context.x_BHWC
    a, s, b, r = (expand(v, x) for v in (a, s, b, r))
    scale = s * b - r * a
    return (s * x_end - r * x) / scale, (b * x - a * x_end) / scale
