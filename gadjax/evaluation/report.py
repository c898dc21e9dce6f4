"""An evaluation as report.json, report.md and samples.png."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gadjax.evaluation.evaluate import Evaluation, Row
from gadjax.evaluation.metrics import METRICS
from gadjax.evaluation.statistics import Estimate
from gadjax.training.preview import grid, save_png

SHEET = 4096  # pixels of width that the pictures may take
SHOWN = 4, 4  # prompts, and seeds of each
ENLARGED = 96  # small pictures are shown at about this side


def as_dict(evaluation: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
    """The report for machines. Every metric is {"value", "low", "high"}."""
    return {
        "settings": settings,
        "rows": {
            row.key: {
                "label": row.label,
                "sampling": row.sampling.to_dict(),
                "evaluations": row.evaluations,
                "metrics": {name: m._asdict() for name, m in row.metrics.items()},
            }
            for row in evaluation.rows
        },
        "absent": evaluation.absent,
        "meaning": {name: text for name, (_, text) in METRICS.items()},
    }


def as_markdown(evaluation: Evaluation, settings: dict[str, Any]) -> str:
    """The report for people."""
    rows = evaluation.rows
    taken = [name for name in METRICS if any(name in row.metrics for row in rows)]
    lines = ["# A student beside its teacher", ""]
    lines += ["| | " + " | ".join(row.label for row in rows) + " |"]
    lines += ["|---|" + "---|" * len(rows)]
    lines += ["| network evaluations | " + " | ".join(str(r.evaluations) for r in rows) + " |"]
    for name in taken:
        cells = (_cell(row.metrics.get(name)) for row in rows)
        lines.append(f"| {METRICS[name][0]} | " + " | ".join(cells) + " |")
    lines += ["", "In brackets: 95 % intervals. Of adherence over pictures (Wilson), of the others"]
    lines += ["over prompts (bootstrap).", "", "## What the numbers mean", ""]
    lines += [f"- {METRICS[name][0]}: {METRICS[name][1]}" for name in taken]
    if evaluation.absent:
        lines += ["", "## Absent", ""]
        lines += [f"- {METRICS[name][0]}: {why}" for name, why in evaluation.absent.items()]
    lines += ["", "## Settings", ""]
    lines += [f"- {name}: {value}" for name, value in settings.items()]
    lines += [f"- {row.label}: {_spelt(row)}" for row in rows]
    return "\n".join([*lines, ""])


def _cell(found: Estimate | None) -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.value:.3f}"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _spelt(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.sampling.to_dict().items())


def sheet(evaluation: Evaluation, prompts: Sequence[str]) -> Image.Image:
    """Some prompts at some seeds: a line per row, the same noise down each column."""
    side = evaluation.rows[0].images_PSHWC.shape[2]
    scale = max(1, ENLARGED // side)
    seeds = min(SHOWN[1], evaluation.rows[0].images_PSHWC.shape[1])
    count = int(np.clip(SHEET // (side * scale * seeds), 1, min(SHOWN[0], len(prompts))))
    captions = [p if s == 0 else "" for p in prompts[:count] for s in range(seeds)]
    shown = []
    for row in evaluation.rows:
        images = row.images_PSHWC[:count, :seeds]
        shown.append((row.label, images.reshape(-1, *images.shape[2:])))
    return grid(shown, captions, scale)


def write_report(
    folder: Path, evaluation: Evaluation, prompts: Sequence[str], settings: dict[str, Any]
) -> None:
    text = json.dumps(as_dict(evaluation, settings), indent=2, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text)
    (folder / "report.md").write_text(as_markdown(evaluation, settings))
    save_png(sheet(evaluation, prompts), folder / "samples.png")
