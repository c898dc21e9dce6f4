"""Tables of the study's finished cells, in Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t

# Metric -> heading of the tables.
METRICS = {
    "adherence": "adherence",
    "frechet": "Fréchet",
    "vendi_ratio": "Vendi / teacher's",
    "alignment_pixels": "seed alignment",
    "tangent_cosine": "tangent cosine",
    "tangent_norm_ratio": "tangent norm",
    "retrieval": "retrieval",
    "path_agreement": "attribute agreement along the path",
}
LABELS = {"teacher": "teacher, 20 steps", "teacher_few": "teacher, the student's steps"}

_TEXT = """
Effect of each term on each base objective on the bundled world, at practical guidance:

    python -m gadjax.experiments.study --seeds {seeds}

Students of a bundled teacher from its own weights, 800 steps of 16 samples (more only in rows
labelled long; methods are the variants of `configs/methods.py`, `gad anchor` there the polar GAD
and the anchor; "adapters": students and critics as LoRA of rank 16, int8: on 8-bit kernels of
attention and feed-forward, evaluated merged with the float32 weights), all else as in
`gadjax/experiments/study_cells.py`; evaluated on 64 prompts x 8 noises with 4 tangents each and a
library of 128 noises, the same ones for every row. A cell is the mean over runs of different seeds,
with the half width of its 95 % interval over runs (Student's t). `reg` is regression to the
teacher's next latent beside the base, `gad` the square loss and `polar` the polar one. Evaluations
are those of the network for a sample and a step, critic updates included. Numbers, config and
curves of every cell are in the .json beside this page. Measured {dates} on {devices}.
"""


def row_path(out: Path, cell: str) -> Path:
    """File of a cell's row."""
    return out / f"{cell.replace('/', '-')}.json"


def write_tables(out: Path, cells: Sequence[str]) -> None:
    """Write README.md of the results: a table for each family, a row for each finished cell.

    cells: FAMILY/VARIANT, in the order of the tables.
    """
    finished = {
        cell: json.loads(p.read_text()) for cell in cells if (p := row_path(out, cell)).is_file()
    }
    if not finished:
        return
    rows = finished.values()
    text = _TEXT.strip().format(
        seeds=max(len(row["seeds"]) for row in rows),
        dates=" to ".join(sorted({row["date"] for row in rows})),
        devices=", ".join(sorted({row["device"] for row in rows})),
    )
    lines = ["# The study", "", text, ""]
    for family in dict.fromkeys(cell.split("/")[0] for cell in cells):
        family_cells = [cell for cell in cells if cell.startswith(f"{family}/")]
        lines += [f"## {family.replace('_', ' ')}", ""]
        lines += _table([(cell, finished[cell]) for cell in family_cells if cell in finished])
        missing = [cell.split("/")[1] for cell in family_cells if cell not in finished]
        lines += [f"Not run yet: {', '.join(missing)}.", ""] if missing else []
    (out / "README.md").write_text("\n".join(lines))


def _table(rows: Sequence[tuple[str, dict]]) -> list[str]:
    if not rows:
        return []
    heads = ["", "runs", *METRICS.values(), "evaluations"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    base = {row["cell"]: row["evaluations"] for _, row in rows}
    setting = None
    for cell, row in rows:
        config = row["config"]
        if setting != (setting := (config["teacher"], config["student"]["steps"])):
            lines += [
                f"| {' | '.join([label, '', *metric_cells([row['teachers'][key]]), ''])} |"
                for key, label in LABELS.items()
            ]
        family, variant = cell.split("/")
        alone = f"{family}/{variant.split('_')[0]}_none"
        if alone not in base and variant.endswith("_gad_anchor"):
            alone = cell.removesuffix("_gad_anchor")
        cost = f"{row['evaluations']:.1f}"
        cost += f" (x {row['evaluations'] / base[alone]:.2f})" if alone in base else ""
        name = variant.removesuffix("_none").replace("_", " ")
        lines.append(
            f"| {' | '.join([name, str(len(row['runs'])), *metric_cells(row['runs']), cost])} |"
        )
    return [*lines, ""]


def metric_cells(runs: Sequence[dict]) -> list[str]:
    """Cells of METRICS: mean over runs, with its interval."""
    return [estimate([run[name] for run in runs if name in run]) for name in METRICS]


def estimate(values: Sequence[float]) -> str:
    """Mean and, of several values, the half width of its 95 % interval (Student's t)."""
    if not values:
        return ""
    text = f"{np.mean(values):.3f}"
    if len(values) > 1:
        reach = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
        text += f" ± {reach:.3f}"
    return text
