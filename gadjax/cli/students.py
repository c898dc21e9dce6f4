"""Students of `gadjax evaluate`: their flags, labels and descriptions."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FLAGS = {"student_teacher": "teacher", "student_preset": "student_preset", "lora": "lora"}


class OfStudent(argparse.Action):
    """Flag of one student: `--student` begins the next one, other flags are of the last one.

    Flags before the first `--student` are of that one. The list of students is `args.student`:
    options of `gadjax.load`, with its name.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        if namespace.student == []:
            namespace.student = [{}]
        elif self.dest == "student" and "name" in namespace.student[-1]:
            namespace.student.append({})
        student = namespace.student[-1]
        if self.dest == "student":
            student["name"] = values
        elif self.dest == "lora":
            student.setdefault("lora", []).append(values)
        else:
            student[FLAGS[self.dest]] = values


def label_students(students: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Options of the students by label: "student", or of several their folder's names and LoRAs'.

    Labels that are alike are numbered.
    """
    from gadjax.formats.lora_file import parse_lora_flag

    if len(students) == 1:
        return {"student": students[0]}
    labelled = {}
    for options in students:
        parts = [Path(options["name"].removeprefix("asset:")).name]
        for file, weight in map(parse_lora_flag, options.get("lora", ())):
            parts.append(file.stem if weight == 1 else f"{file.stem}:{weight:g}")
        name = " + ".join(parts)
        label, number = name, 2
        while label in labelled:
            label, number = f"{name} ({number})", number + 1
        labelled[label] = options
    return labelled


def describe_students(students: list[dict[str, Any]]) -> dict[str, str]:
    """Students with their flags, by the key of their row."""
    texts = {}
    for number, options in enumerate(students, 1):
        words = [options["name"], *(f"--lora {lora}" for lora in options.get("lora", ()))]
        if "student_preset" in options:
            words.append(f"--student-preset {options['student_preset']}")
        texts["student" if number == 1 else f"student_{number}"] = " ".join(words)
    return texts


def distillation_guidance(
    options: list[dict[str, Any]], students: Mapping[str, Any], chosen: float | None
) -> float | None:
    """Teacher's guidance in the students' training; None if it is unknown.

    Args:
        options: flags of the students.
        students: the loaded models.
        chosen: value of --teacher-guidance, if it was given.

    Raises:
        InputError: students of different ones, and none chosen.
    """
    from gadjax.assets import resolve
    from gadjax.errors import InputError
    from gadjax.formats.sampling_config import read_teacher_guidance
    from gadjax.io.storage import is_remote

    known = {}
    for flags, student in zip(options, students.values(), strict=True):
        name = flags["name"]
        if student.trained:
            known[student.trained.teacher_guidance] = name
        elif not is_remote(name):
            known[read_teacher_guidance(resolve(name))] = name
    known.pop(None, None)
    if len(known) > 1 and chosen is None:
        texts = (f"{guidance:g} ({name})" for guidance, name in known.items())
        raise InputError(
            f"--teacher-guidance: found students distilled at {', '.join(texts)}; expected the flag"
        )
    return next(iter(known), None)
