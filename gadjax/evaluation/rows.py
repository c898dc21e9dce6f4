"""Rows of an evaluation: which models are drawn, under which labels, and whether they fit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gadjax.errors import InputError
from gadjax.evaluation.oracles import World
from gadjax.evaluation.results import EvaluationConfig
from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import sampler_and_times

MINIMUMS = {"seeds": 2, "tangents": 0, "batch": 1, "library": 0, "moves": 0, "strips": 0}


def label_rows(
    teacher: Model, students: Model | Mapping[str, Model]
) -> dict[str, tuple[str, Model]]:
    """Labels and models of the rows by key.

    Keys: "teacher"; "teacher_few" for the first student's number of steps, "teacher_few_N" for
    another N; "student", "student_2" and so on.
    """
    students = {"student": students} if isinstance(students, Model) else students
    rows = {"teacher": ("teacher", teacher)}
    for steps in dict.fromkeys(model.sampling.steps for model in students.values()):
        key = "teacher_few" if len(rows) == 1 else f"teacher_few_{steps}"
        few = replace(teacher.sampling, steps=steps, timesteps=None)
        rows[key] = "teacher", replace(teacher, sampling=few)
    for number, (label, model) in enumerate(students.items(), 1):
        rows["student" if number == 1 else f"student_{number}"] = label, model
    return {
        key: (f"{label}, {model.sampling.steps} steps", model)
        for key, (label, model) in rows.items()
    }


def check_rows(
    models: Mapping[str, Model], prompts: Sequence[str], world: World, config: EvaluationConfig
) -> None:
    """Check, before anything is drawn, that all parts of an evaluation go together.

    Args:
      models: of all rows, by key.
      prompts: which the world's oracle has to parse.
      world: oracle, extractor and layout task.
      config: sizes of the evaluation.
    Raises: InputError.
    """
    for name, minimum in MINIMUMS.items():
        if getattr(config, name) < minimum:
            raise InputError(f"{name}: found {getattr(config, name)}; expected {minimum} or more")
    if config.library == 1:
        raise InputError("library: found 1 noise; expected 2 or more, or 0 for none")
    latent = models["teacher"].pipeline.latent
    for model in models.values():
        try:
            sampler_and_times(model.pipeline, model.sampling)
        except InputError as error:
            raise InputError(f"{model.name}: {error}") from None
        if model.pipeline.latent != latent:
            raise InputError(
                f"{model.name}: found latents {model.pipeline.latent}; expected {latent}, "
                "the teacher's"
            )
    side = latent[0] * models["teacher"].pipeline.upscale
    if world.size not in (None, side):
        raise InputError(
            f"world: found one of {world.size} x {world.size} pictures; expected {side} x {side}, "
            "as the teacher draws (or world none)"
        )
    for prompt in prompts if world.oracle else ():
        try:
            world.oracle.parse(prompt)
        except InputError as error:
            raise InputError(f"prompts: {error} (or world none)") from None
