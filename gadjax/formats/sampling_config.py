"""gadjax.json: how the pipeline folder that holds it is to be sampled.

A diffusers folder names its scheduler, but not the number of steps, the timesteps or the guidance
that its weights are meant for. diffusers ignores the file.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadjax.errors import InputError, short_repr
from gadjax.io.untrusted import read_json

GADJAX_JSON = "gadjax.json"
LARGEST, MOST = 1e9, 10_000  # of any number; of steps, and of the tokens of a prompt


@dataclass(frozen=True)
class SamplingConfig:
    """What a picture is drawn with.

    timesteps: the times that the steps start from, noisiest first; the steps are then of order 1.
      None: the scheduler's own grid and order. guidance: up to 1 the empty prompt is left out.
    length: of the prompt in tokens. negative: the prompt that guidance leads away from, None for
      the family's own. scale: of the initial noise (SiD's one-step students start from
      sigma(625) z).
    """

    steps: int = 20
    timesteps: tuple[float, ...] | None = None
    guidance: float = 4.5
    length: int = 120
    negative: str | None = None
    scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """What `read_sampling` reads back from gadjax.json."""
        found = {"steps": self.steps, "guidance": self.guidance, "length": self.length}
        if self.scale != 1:
            found["scale"] = self.scale
        return found if self.timesteps is None else {**found, "timesteps": list(self.timesteps)}


def read_sampling(folder: Path, default: SamplingConfig) -> SamplingConfig:
    """The folder's gadjax.json; `default` where it has none. Other keys are left alone.

    Raises: InputError naming file and key for a value that makes no sense.
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
                f"{path}, timesteps: found {short_repr(timesteps)}; expected numbers in falling order"
            )
        timesteps = tuple(float(t) for t in timesteps)
    steps = _whole(path, cfg, "steps", len(timesteps) if timesteps else default.steps)
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
    length = _whole(path, cfg, "length", default.length)
    return SamplingConfig(steps, timesteps, float(guidance), length, scale=float(scale))


def read_world(folder: Path) -> str | None:
    """The name of the world that the folder's gadjax.json says it was trained on, if any."""
    path = Path(folder) / GADJAX_JSON
    world = read_json(path).get("world") if os.path.lexists(path) else None
    if world is not None and not isinstance(world, str):
        raise InputError(f"{path}, world: found {short_repr(world)}; expected a name")
    return world


def read_teacher_guidance(folder: Path) -> float | None:
    """The guidance of the teacher that a student's folder was distilled from, where it says so.

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
    return type(value) in (int, float) and abs(value) <= LARGEST  # of NaN this is false


def _whole(path: Path, cfg: dict[str, Any], key: str, default: int) -> int:
    value = cfg.get(key, default)
    if type(value) is not int or not 1 <= value <= MOST:
        raise InputError(
            f"{path}, {key}: found {short_repr(value)}; expected a whole number from 1 to {MOST}"
        )
    return value
