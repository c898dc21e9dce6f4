"""Regression to the end of the teacher's ODE: output matching in its plainest form."""

from dataclasses import dataclass

from gadjax.objectives.base import Context, Needs, TeacherMap, sample_mean
from gadjax.objectives.common import sg, student_map
from gadjax.objectives.compose import Addable


@dataclass(frozen=True)
class Regression(Addable):
    """E |S(x_k) - ODE_T(x_k)|^2 over the drawn step's own interval, or to the clean end.

    end="whole" compares the end of all the student's steps from z, differentiated through.
    The teacher's map is stop-gradiented. (Luhman & Luhman 2021 for end="clean" in one step;
    Salimans & Ho 2022 for the stepwise form.) Cost: 2 * steps teacher evaluations.
    """

    end: str = "next"
    steps: int = 0

    @property
    def needs(self) -> Needs:
        full_map = self.end == "whole"
        return Needs(
            student=not full_map,
            next_latent=self.end == "next",
            endpoint=full_map,
            maps=(TeacherMap(self.end, self.steps),),
        )

    def __call__(self, context: Context):
        teacher_end = sg(context.maps[TeacherMap(self.end, self.steps)][0])
        if self.end == "whole":
            return sample_mean((context.endpoint - teacher_end) ** 2), {}
        return sample_mean((student_map(context, self.end) - teacher_end) ** 2), {}
