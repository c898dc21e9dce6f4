"""Sampling configuration of a pipeline folder: gadjax.json.

A diffusers folder names its scheduler, but not the number of steps, the timesteps or the guidance
scale of its weights. diffusers ignores the file.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadjax.errors import InputError, short_repr
from gadjax.io.untrusted import read_json

GADJAX_JSON = "gadjax.json"
MAX_NUMBER, MAX_COUNT = 1e9, 10_000  # a count: sampling steps, tokens of a prompt


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling settings: steps, timesteps and classifier-free guidance.

    Attributes:
      steps: number of steps.
      timesteps: times that the steps start from, noisiest first, for a sampler of order 1; None:
        the scheduler's grid and order.
      guidance: guidance scale; up to 1 there is no classifier-free guidance.
      length: prompt length in tokens.
      negative: negative prompt; None: the family's default.
      scale: scale of the initial noise (SiD's one-step students start from sigma(625) z).
    """

    steps: int = 20
    timesteps: tuple[float, ...] | None = None
    guidance: float = 4.5
    length: int = 120
    negative: str | None = None
    scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Entries of gadjax.json that `read_sampling` reads."""
        entries = {"steps": self.steps, "guidance": self.guidance, "length": self.length}
        if self.scale != 1:
            entries["scale"] = self.scale
        return entries if self.timesteps is None else {**entries, "timesteps": list(self.timesteps)}


def read_sampling(folder: Path, default: SamplingConfig) -> SamplingConfig:
    """Read the sampling settings in a folder's gadjax.json; `default` if it has none.

    Other keys are ignored.
    Raises: InputError naming file and key for an invalid value.
    """
    path = Path(folder) / GADJAX_JSON
    if not os.path.lexists(path):
        return default
    cfg = read_json(path)
    timesteps = cfg.get("timesteps")
    if timesteps is not None:
        numbers = isinstance(timesteps, list) and all(_is_number(t) for t in timesteps)
        if not numbers or not timesteps or sorted(set(timesteps), reverse=True) != timesteps:
            raise InputError(
                f"{path}, timesteps: found {short_repr(timesteps)}; expected numbers in falling "
                "order"
            )
        timesteps = tuple(float(t) for t in timesteps)
    steps = _read_count(path, cfg, "steps", len(timesteps) if timesteps else default.steps)
    if timesteps and steps != len(timesteps):
        raise InputError(
            f"{path}, steps: found {steps}; expected {len(timesteps)}, one for each of timesteps"
        )
    guidance = cfg.get("guidance", default.guidance)
    if not _is_number(guidance):
        raise InputError(f"{path}, guidance: found {short_repr(guidance)}; expected a number")
    scale = cfg.get("scale", default.scale)
    if not _is_number(scale) or scale <= 0:
        raise InputError(f"{path}, scale: found {short_repr(scale)}; expected a positive number")
    length = _read_count(path, cfg, "length", default.length)
    return SamplingConfig(steps, timesteps, float(guidance), length, scale=float(scale))


def read_world(folder: Path) -> str | None:
    """Read the name of the toy world that a folder's model was trained on; None if not given."""
    path = Path(folder) / GADJAX_JSON
    world = read_json(path).get("world") if os.path.lexists(path) else None
    if world is not None and not isinstance(world, str):
        raise InputError(f"{path}, world: found {short_repr(world)}; expected a name")
    return world


def read_teacher_guidance(folder: Path) -> float | None:
    """Read the guidance scale of a student's teacher from gadjax.json; None if not given.

    Raises: InputError for a value that is no number.
    """
    path = Path(folder) / GADJAX_JSON
    teacher = read_json(path).get("teacher") if os.path.lexists(path) else None
    guidance = teacher.get("guidance") if isinstance(teacher, dict) else None
    if guidance is not None and not _is_number(guidance):
        raise InputError(
            f"{path}, teacher.guidance: found {short_repr(guidance)}; expected a number"
        )
    return guidance


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER  # false for NaN


def _read_count(path: Path, cfg: dict[str, Any], key: str, default: int) -> int:
    value = cfg.get(key, default)
    if type(value) is not int or not 1 <= value <= MAX_COUNT:
        raise InputError(
            f"{path}, {key}: found {short_repr(value)}; expected a whole number from 1 to "
            f"{MAX_COUNT}"
        )
    return value
