"""Roles that train a part of their network: settings by role, and the frozen rest."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from gadjax.errors import InputError, short_repr
from gadjax.models.params import cast, flatten, split_frozen
from gadjax.pipelines.pipeline import Pipeline
from gadjax.training.lora import check_regex, loras
from gadjax.types import Params


def trained_patterns(config: Mapping[str, Any]) -> dict[str, str]:
    """Regex of the paths of the parameters that student and critic train.

    A role that trains all or adapters is left out. What is None for the critic is as for the
    student.

    config: of a run, or its JSON; one of an older workdir has no such settings.

    Raises: InputError for what is no regex, or a regex beside adapters, fewer layers or a random
      start.
    """
    student = config["student"].get("trained", "")
    critic = config.get("critic", {}).get("trained")
    adapted = loras(config).keys()
    for role, pattern in (("student", student), ("critic", critic)):
        if not pattern:
            continue
        check_regex(f"{role}.trained", pattern)
        if role in adapted:
            raise InputError(
                f"{role}.trained: found {short_repr(pattern)} and adapters; expected '', as "
                f"{role}.lora.targets has what they are of"
            )
    inherited = "" if "critic" in adapted else student
    patterns = {"student": student, "critic": inherited if critic is None else critic}
    patterns = {role: pattern for role, pattern in patterns.items() if pattern}
    _check_starts(config, patterns)
    return patterns


def _check_starts(config: Mapping[str, Any], patterns: Mapping[str, str]) -> None:
    student, critics = config["student"], config.get("critic", {}).get("init")
    if "student" in patterns and student["layers"]:
        raise InputError(
            f"student.trained: found {short_repr(patterns['student'])} with student.layers "
            f"{short_repr(tuple(student['layers']))}; expected '' or ()"
        )
    random = [
        r for r in patterns if student["init"] == "random" and (r == "student" or not critics)
    ]
    if random:
        raise InputError(
            f"{random[0]}.trained: found {short_repr(patterns[random[0]])} with student.init "
            "'random'; expected '', as the rest would stay random"
        )


def check_matches(config: ConfigDict, pipeline: Pipeline) -> None:
    """Check that each regex has something to train. Raises: InputError naming one that has not."""
    part = pipeline.folder.components[pipeline.backbone]
    paths = flatten(split_frozen(part.abstract, part.frozen)[0])
    for role, pattern in trained_patterns(config).items():
        if not any(re.search(pattern, path) for path in paths):
            raise InputError(
                f"{role}.trained: found {short_repr(pattern)}, which matches none of {len(paths)} "
                f"parameters; expected a regex of paths such as {next(iter(paths))}"
            )


def bases_on_teacher(
    config: ConfigDict,
    roles: Collection[str],
    pipeline: Pipeline,
    teacher: Params,
    held: Collection[str],
    dtype: Any,
) -> tuple[dict[str, str], Params]:
    """Parameters that roles which start at the teacher do not train themselves.

    Adapters are on the teacher, and a role that trains a part takes the rest from it, where the run
    holds it in any case.

    Args:
      config: training config.
      roles: student, critic or both.
      pipeline: the teacher's pipeline.
      teacher: parameters of the backbone.
      held: names of the networks that the run holds.
      dtype: compute dtype.

    Returns: key in `Run.frozen` by role; parameters for the key "untrained", {} for none.
    """
    patterns, backbone = trained_patterns(config), pipeline.backbone
    in_part = patterns.keys() if backbone in held else set()
    sharing = [role for role in roles if role in loras(config) or role in in_part]
    others = [role for role in roles if role not in sharing]
    keys = dict.fromkeys(sharing, backbone)
    rest = untrained_part(pipeline, teacher, [patterns.get(role, "") for role in others])
    if not rest or not others:
        return keys, {}
    rest = cast(rest, dtype) if patterns.keys() & others else rest
    return keys | dict.fromkeys(others, "untrained"), rest


def untrained_part(pipeline: Pipeline, params: Params, patterns: Collection[str]) -> Params:
    """Parameters of a backbone that one of several roles at least does not train.

    Args:
      pipeline: the teacher's pipeline.
      params: of the backbone.
      patterns: regex of what a role trains, one a role; "" for everything.
    """
    part = pipeline.folder.components[pipeline.backbone]
    return split_frozen(params, part.frozen, patterns)[1]
