"""Output matching in its plainest form: regression to where the teacher's ODE leads."""

from dataclasses import dataclass

from gadjax.objectives.base import Context, Needs, TeacherMap, sample_mean
from gadjax.objectives.common import sg, student_map
from gadjax.objectives.compose import Addable


@dataclass(frozen=True)
class Regression(Addable):
    """E |S(x_k) - ODE_T(x_k)|^2 over the drawn step's own interval, or to the clean end.

    end="whole" compares where all the student's steps lead from z, differentiated through.
    The teacher's map is stop-gradiented. (Luhman & Luhman 2021 for end="clean" in one step;
    Salimans & Ho 2022 for the stepwise form.) Cost: 2 * steps teacher evaluations.
    """

    end: str = "next"
    steps: int = 4

    @property
    def needs(self) -> Needs:
        whole = self.end == "whole"
        maps = {TeacherMap(self.end, self.steps): False}
        return Needs(student=not whole, endpoint=whole, maps=maps)

    def __call__(self, context: Context):
        arrived = sg(context.maps[TeacherMap(self.end, self.steps)][0])
        if self.end == "whole":
            return sample_mean((context.endpoint - arrived) ** 2), {}
        loss_B = sample_mean((student_map(context, self.end) - arrived) ** 2)
        return loss_B * context.base_weight_B, {}
