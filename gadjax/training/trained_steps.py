"""Checks of students that train some of their steps, beside an expert of those before."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from gadjax.errors import InputError, short_repr
from gadjax.objectives.base import Needs
from gadjax.training.workdir import is_source


def check_trained_steps(config: ConfigDict, times: Sequence[float]) -> None:
    """Check which of its steps a student trains, and the expert of those before.

    Args:
      config: training config.
      times: of the student's steps.

    Raises: InputError for numbers that are not those of steps in order, and for an expert without
      steps of its own, of another depth, or beside grids that are drawn anew.
    """
    steps, expert = tuple(config.student.trained_steps), config.student.earlier_expert
    are_numbers = all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
    in_order = are_numbers and len(steps) == 2 and 0 <= steps[0] < steps[1] <= len(times)
    if steps and not in_order:
        raise InputError(
            f"student.trained_steps: found {short_repr(steps)}; expected the first step and the "
            f"one after the last, in order from 0 to {len(times)}, or ()"
        )
    if not expert:
        return
    if not is_source(expert):
        raise InputError(
            f"student.earlier_expert: found {expert!r}; expected a diffusers folder, a LoRA or a "
            "workdir of gadjax train"
        )
    if not steps or steps[0] == 0:
        raise InputError(
            f"student.trained_steps: found {short_repr(steps)}; expected the steps after those of "
            "student.earlier_expert, such as (2, 4)"
        )
    for key in ("layers", "redraw"):
        if config.student[key]:
            raise InputError(
                f"student.{key}: found {short_repr(tuple(config.student[key]))} and an earlier "
                "expert; expected ()"
            )


def check_drawn_steps(config: ConfigDict, needs: Needs) -> None:
    """Check that an objective has drawn steps where a student does not train all its steps.

    Raises: InputError.
    """
    steps = tuple(config.student.trained_steps)
    if not steps:
        return
    where = f"student.trained_steps: found {steps}"
    if needs.endpoint or needs.full_map or not (needs.student or needs.first_step):
        raise InputError(
            f"{where} and a loss of all steps, or of none; expected (), or a loss of drawn steps"
        )
    if needs.first_step and steps[0] > 0:
        raise InputError(f"{where} and a loss of the first step; expected it among them")
    if needs.detach_first_step and steps[1] - steps[0] < 2:
        raise InputError(f"{where} and an anchor; expected another step for the base objective")
