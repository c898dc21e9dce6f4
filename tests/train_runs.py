"""Runs of `gadjax train` in this process, and what they leave behind."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gadjax.checkpoints.restore import read_params
from gadjax.cli.main import main


def train(config: Path | str, workdir: Path, *more: str) -> int:
    """Exit code of a run in this process."""
    return main(["train", "--config", str(config), "--workdir", str(workdir), *more])


def rows(workdir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; none before there is a file."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(workdir: Path) -> list[int]:
    return [row["step"] for row in rows(workdir)]


def losses(workdir: Path) -> dict[int, float]:
    """The student's loss by step."""
    return {row["step"]: row["student/loss"] for row in rows(workdir)}


def read_vector(workdir: Path, part: str, step: int | None = None) -> np.ndarray:
    """All parameters of the newest (or the given) step as one vector."""
    _, params, _ = read_params(workdir / "checkpoints", part, step)
    return np.concatenate([x.ravel() for x in jax.tree.leaves(params)])
