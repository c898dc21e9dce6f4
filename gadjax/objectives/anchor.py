"""The diversity anchor of DP-DMD: the first step stays where the teacher's own noise leads."""

from collections.abc import Sequence
from dataclasses import dataclass

from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, TeacherMap, sample_mean
from gadjax.objectives.common import sg
from gadjax.objectives.compose import Addable
from gadjax.types import expand


@dataclass(frozen=True)
class Anchor(Addable):
    """Step one regresses to a teacher target from the same z; nobody else trains it.

    z_k is where the teacher's guided ODE is at time t_k: the end of the student's first
    interval, or `until` (DP-DMD's K: the later in the walk, the more of the teacher's picture is
    fixed by the first step).
    target="v" (flow models): |v_S - (z - z_k) / (t_1 - t_k)|^2, v = eps - x0 (arXiv 2602.03139).
      For any other schedule the same secant: the (x0, eps) whose straight path passes
      through z and z_k.
    target="x0" (diffusion models): |x0_S(z) - T_w(z_k)|^2.
    Teacher and targets are stop-gradiented. Needs the gradient cut after the first step.
    All samples train it where the student's walk to the end is there anyway (DMD with
    backprop="all"); else those whose drawn step is the first, or where GAD wants the same map,
    which is then made once.
    Cost: 2 * steps teacher evaluations for the map; "x0" adds 2.
    """

    target: str = "v"
    steps: int = 4
    until: float | None = None

    def __post_init__(self):
        if self.target not in ("v", "x0"):
            raise InputError(f"objective.anchor.target: found {self.target!r}; expected v or x0")

    @property
    def map(self) -> TeacherMap:
        return TeacherMap("next", self.steps, self.until)

    @property
    def needs(self) -> Needs:
        return Needs(first=(self.map,), detach_first_step=True)

    def check(self, times: Sequence[float]) -> None:
        if self.until is not None and not 0 < self.until < times[0]:
            raise InputError(
                f"objective.anchor.until: found {self.until}; expected a time between 0 and "
                f"{times[0]}, from which the student starts"
            )

    def __call__(self, context: Context):
        said, arrived, weight_B = context.first[self.map]
        arrived, context = sg(arrived), context.at_first_step()
        end_B = context.map_end(self.map)
        if self.target == "x0":
            error = said.x0 - sg(context.teacher(arrived, end_B).x0)
        else:
            x0, eps = secant(context, arrived, end_B)
            error = (said.eps - said.x0) - sg(eps - x0)
        loss_B = sample_mean(error**2)
        return loss_B * weight_B, {}


def secant(context: Context, arrived, end_B):
    """The x0 and eps whose path alpha x0 + sigma eps passes through x_k and where it arrived."""
    (a, s), (b, r) = (context.schedule.alpha_sigma(t) for t in (context.t_B, end_B))
    x = context.x_BHWC
    a, s, b, r = (expand(v, x) for v in (a, s, b, r))
    scale = s * b - r * a
    return (s * arrived - r * x) / scale, (b * x - a * arrived) / scale
