"""Sampling configuration of a pipeline folder: gadjax.json.

A diffusers folder names its scheduler, but not the number of steps, the timesteps or the guidance
scale of its weights. diffusers ignores the file.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadjax.errors import InputError, short_repr
from gadjax.io.untrusted import is_count, is_number, is_text, read_json

GADJAX_JSON = "gadjax.json"
MAX_COUNT = 10_000  # sampling steps, tokens of a prompt
ROLLOUTS = "ode", "fresh_noise"
COUNT = f"a whole number from 1 to {MAX_COUNT}"


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
      rollout: of explicit timesteps where the folder's scheduler is the teacher's: "ode", or
        "fresh_noise" or "fixed_noise", the initial one, added to each predicted x0.
      nasa: factor of the negative prompt's cross-attention, which is subtracted from the prompt's,
        in the place of guidance; 0 for none.
      eta: share of fresh noise in the steps of TCDScheduler.
    """

    steps: int = 20
    timesteps: tuple[float, ...] | None = None
    guidance: float = 4.5
    length: int = 120
    negative: str | None = None
    scale: float = 1.0
    rollout: str = "ode"
    nasa: float = 0.0
    eta: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Entries of gadjax.json that `read_sampling` reads."""
        entries = {"steps": self.steps, "guidance": self.guidance, "length": self.length}
        if self.scale != 1:
            entries["scale"] = self.scale
        if self.eta:
            entries["eta"] = self.eta
        return entries if self.timesteps is None else {**entries, "timesteps": list(self.timesteps)}


def read_sampling(folder: Path, default: SamplingConfig) -> SamplingConfig:
    """Read the sampling settings in a folder's gadjax.json; `default` if it has none.

    Other keys are ignored.
    Raises: InputError naming file and key for an invalid value.
    """
    path = Path(folder) / GADJAX_JSON
    return parse_sampling(path, read_json(path), default) if os.path.lexists(path) else default


def parse_sampling(path: Path, cfg: Mapping[str, Any], default: SamplingConfig) -> SamplingConfig:
    """Sampling settings of the entries of `SamplingConfig.to_dict`.

    Args:
      path: their file, for messages.
      cfg: the entries, "rollout" where the scheduler is the teacher's, and others.
      default: settings of missing ones.

    Raises: InputError as `read_sampling`.
    """
    timesteps, steps = cfg.get("timesteps"), cfg.get("steps", default.steps)
    if timesteps is not None:
        valid = isinstance(timesteps, list) and timesteps and all(map(is_number, timesteps))
        valid = valid and sorted(set(timesteps), reverse=True) == timesteps
        _check(valid, path, "timesteps", timesteps, "numbers in falling order")
        timesteps = tuple(float(t) for t in timesteps)
        steps = cfg.get("steps", len(timesteps))
    _check(is_count(steps, 1, MAX_COUNT), path, "steps", steps, COUNT)
    if timesteps:
        expected = f"{len(timesteps)}, one for each of timesteps"
        _check(steps == len(timesteps), path, "steps", steps, expected)
    guidance, scale, length, eta = (
        cfg.get(key, getattr(default, key)) for key in ("guidance", "scale", "length", "eta")
    )
    _check(is_number(guidance), path, "guidance", guidance, "a number")
    _check(is_number(scale) and scale > 0, path, "scale", scale, "a positive number")
    _check(is_count(length, 1, MAX_COUNT), path, "length", length, COUNT)
    _check(is_number(eta) and 0 <= eta <= 1, path, "eta", eta, "a number from 0 to 1")
    rollout = cfg.get("rollout", "ode")
    _check(rollout in ROLLOUTS, path, "rollout", rollout, f"one of {', '.join(ROLLOUTS)}")
    options = {"scale": float(scale), "rollout": rollout, "eta": float(eta)}
    return SamplingConfig(steps, timesteps, float(guidance), length, **options)


def read_world(folder: Path) -> str | None:
    """Read the name of the toy world that a folder's model was trained on; None if not given."""
    path = Path(folder) / GADJAX_JSON
    world = read_json(path).get("world") if os.path.lexists(path) else None
    _check(world is None or is_text(world), path, "world", world, "a name")
    return world


def read_teacher_guidance(folder: Path) -> float | None:
    """Read the guidance scale of a student's teacher from gadjax.json; None if not given.

    Raises: InputError for a value that is no number.
    """
    path = Path(folder) / GADJAX_JSON
    teacher = read_json(path).get("teacher") if os.path.lexists(path) else None
    guidance = teacher.get("guidance") if isinstance(teacher, dict) else None
    valid = guidance is None or is_number(guidance)
    _check(valid, path, "teacher.guidance", guidance, "a number")
    return guidance


def _check(valid: bool, path: Path, key: str, value: Any, expected: str) -> None:
    if not valid:
        raise InputError(f"{path}, {key}: found {short_repr(value)}; expected {expected}")
