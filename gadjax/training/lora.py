"""Low-rank adapters of a run: settings by role."""

import re
from collections.abc import Mapping
from typing import Any

from gadjax import assets
from gadjax.errors import InputError, short_repr
from gadjax.formats.lora_header import is_lora
from gadjax.io.untrusted import is_count, is_number
from gadjax.models.adapters import Lora

MAX_RANK = 8192


def loras(config: Mapping[str, Any]) -> dict[str, Lora]:
    """Adapter settings of student and critic; a role that trains whole weights is left out.

    What is None for the critic is as for the student.

    config: of a run, or its JSON; one of an older workdir has no such settings.

    Raises: InputError for a rank, alpha or regex that is none, or adapters on random weights.
    """
    if "lora" not in config["student"]:
        return {}
    student = dict(config["student"]["lora"])
    critic = {
        key: student[key] if value is None else value
        for key, value in config["critic"]["lora"].items()
    }
    roles = {"student": student, "critic": critic}
    for role, values in roles.items():
        _check(f"{role}.lora", **values)
    if student["rank"] and config["student"]["init"] == "random":
        raise InputError(
            f"student.init: found 'random' with student.lora.rank {student['rank']}; expected the "
            "weights that are adapted"
        )
    return {role: Lora(**values) for role, values in roles.items() if values["rank"]}


def base_source(config: Mapping[str, Any], role: str) -> str:
    """Source of the weights that a role's adapters are on, or that it trains in part: "teacher", or
    the path of its start.

    Adapters that start at a LoRA of the teacher go on training it.
    """
    init = config[role].get("init")  # older workdirs have none of the critic
    adapted = role in loras(config)
    on_teacher = init in ("teacher", None) or adapted and is_lora(assets.resolve(init))
    return "teacher" if on_teacher else init


def _check(name: str, rank: int, alpha: float | None, targets: str) -> None:
    if not is_count(rank, 0, MAX_RANK):
        raise InputError(
            f"{name}.rank: found {short_repr(rank)}; expected 1 to {MAX_RANK}, or 0 to train whole "
            "weights"
        )
    if alpha is not None and not (is_number(alpha) and alpha > 0):
        raise InputError(f"{name}.alpha: found {short_repr(alpha)}; expected a number above 0")
    check_regex(f"{name}.targets", targets)


def check_regex(key: str, pattern: Any) -> None:
    """Check that a value of the config is a regex. Raises: InputError naming its key."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InputError(
            f"{key}: found {short_repr(pattern)} ({error}); expected a regex"
        ) from None
