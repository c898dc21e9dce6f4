"""Comparison of a student before and after its repair: table and pictures."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gadjax.evaluation.evaluate import evaluate
from gadjax.evaluation.metric_catalogue import SUMMARY
from gadjax.evaluation.oracles import World
from gadjax.evaluation.report import cell
from gadjax.evaluation.results import Evaluation, EvaluationConfig, Row
from gadjax.io.image_grid import grid, save_png
from gadjax.io.storage import write_atomic
from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import draw, initial_noise

REPORT, TABLE = "repair.json", "repair.md"
PICTURE, SLIDER = "before_after.png", "scales.png"
SCALES = 0.0, 0.25, 0.5, 0.75, 1.0
SHOWN = 3, 4  # prompts, seeds of each
SMALL = 64  # pictures of at most this side are enlarged
# Metrics of a table, where the world has them.
MEASURED = (*SUMMARY, "tangent_norm_ratio", "distance_pixels_ratio")


def compare(
    teacher: Model,
    students: dict[str, Model],
    prompts: Sequence[str],
    world: World,
    config: EvaluationConfig,
) -> tuple[Evaluation, dict[str, Row]]:
    """Rows of the teacher, of the teacher in the students' steps, and of each student.

    Args:
      teacher: in its own steps.
      students: by label, all of the same number of steps.
      prompts, world, config: as `gadjax.evaluation.evaluate.evaluate` takes them.

    Returns: one evaluation, for its catalogue, and the rows by label.
    """
    evaluation = evaluate(teacher, students, prompts, world, config)
    teachers = [row for row in evaluation.rows if row.key.startswith("teacher")]
    rows = {row.label: row for row in teachers}
    for label, row in zip(students, evaluation.rows[len(teachers) :], strict=True):
        rows[label] = replace(row, label=label)
    return evaluation, rows


def table(evaluation: Evaluation, rows: dict[str, Row]) -> str:
    """Markdown table: a metric a line, a model a column, with 95 % intervals."""
    names = [
        name
        for name in MEASURED
        if name in evaluation.catalogue and any(name in row.metrics for row in rows.values())
    ]
    lines = ["| | " + " | ".join(rows) + " |", "|---|" + "---|" * len(rows)]
    for name in names:
        cells = [cell(row.metrics.get(name)) for row in rows.values()]
        lines.append(f"| {evaluation.catalogue[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_comparison(
    folder: Path,
    evaluation: Evaluation,
    rows: dict[str, Row],
    prompts: Sequence[str],
    facts: dict[str, Any],
) -> None:
    """Write the picture of all rows under the same noises, repair.md, and repair.json, which is
    the sign of a finished repair, last.

    Args:
      folder: exists.
      evaluation, rows: of `compare`.
      prompts: those of the evaluation.
      facts: what was done, for the report.
    """
    metrics = {
        label: {name: estimate._asdict() for name, estimate in row.metrics.items()}
        for label, row in rows.items()
    }
    lines = ["# Repair", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [table(evaluation, rows)]
    lines += [
        "In brackets: 95 % intervals over prompts of one run. The same noise is in each column:"
    ]
    lines += ["", f"![before and after]({PICTURE})", "", "The LoRA at scales 0 to 1:", ""]
    some, seeds = SHOWN
    seeds = min(seeds, next(iter(rows.values())).images_PSHWC.shape[1])
    captions = [p if s == 0 else "" for p in prompts[:some] for s in range(seeds)]
    shown = [
        (row.label, row.images_PSHWC[:some, :seeds].reshape(-1, *row.images_PSHWC.shape[2:]))
        for row in rows.values()
    ]
    save_png(grid(shown, captions, _magnification(shown[0][1])), folder / PICTURE)
    write_atomic(folder / TABLE, "\n".join([*lines, f"![scales]({SLIDER})", ""]))
    write_atomic(folder / REPORT, json.dumps(facts | {"rows": metrics}, indent=2) + "\n")


def write_scales(folder: Path, models: dict[float, Model], prompts: Sequence[str]) -> None:
    """Write the picture of a LoRA at several scales, one prompt and noise a column."""
    prompts = list(prompts[: SHOWN[0] * SHOWN[1]])
    noise = initial_noise(0, len(prompts), next(iter(models.values())).pipeline.latent)
    shown = [(f"scale {scale:g}", draw(model, prompts, noise)) for scale, model in models.items()]
    save_png(grid(shown, prompts, _magnification(shown[0][1])), folder / SLIDER)


def _magnification(images: np.ndarray) -> int:
    return 3 if images.shape[1] <= SMALL else 1
