"""Study of repairs: objectives and settings on one distilled student, several seeds at once.

    python -m gadjax.experiments.repair_study STUDENT [VARIANT ...] [--seeds 3]
                                          [--out docs/results/repair]

STUDENT is a pipeline folder of a student of the bundled flow teacher: the patient. A variant with a
row in --out is finished; without any, all are done in order.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gadjax import assets
from gadjax.errors import InputError
from gadjax.experiments.study_runs import Evaluator, evaluations, train_seeds
from gadjax.experiments.study_tables import LABELS, METRICS, metric_cells
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.sampling_config import read_sampling
from gadjax.io.storage import write_atomic
from gadjax.models.adapters import merged
from gadjax.pipelines.pipeline import make_pipeline
from gadjax.pipelines.sampling import few_step_settings
from gadjax.runtime.settings import pinned_jax_config
from gadjax.training.config import as_json, read_config
from gadjax.training.setup import Run, prepare

TEACHER = "asset:shapes_flow_teacher"
UPDATES = 300  # half of the command's default, which is the row updates_600
REGRESSION = {"regression": {"steps": 4}}
POLAR = {"gad": {"weight": 0.3, "steps": 4, "loss": "polar"}}
ANCHOR = {"anchor": {"weight": 0.05, "steps": 4}}
TETHER = {"tether": {"weight": 0.1}}
LOW = {"gad": POLAR["gad"] | {"direction": "low_frequency"}}
DEFAULT = REGRESSION | TETHER
# As adapters that others publish; 8 x 8 latents have 4 x 4 cells.
SEEDS = {"seed_difference": {"cells": 4}}
SEEDS_4 = {"seed_difference": {"cells": 4, "steps": 4}}
# Objective of each variant, and changes of the config `repair` where there are any.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "regression_tether": (DEFAULT, {}),
    "regression": (REGRESSION, {}),
    "regression_tether_polar": (DEFAULT | POLAR, {}),
    "regression_tether_anchor": (DEFAULT | ANCHOR, {}),
    "all": (DEFAULT | POLAR | ANCHOR, {}),
    "polar": (POLAR, {}),
    "polar_anchor": (POLAR | ANCHOR, {}),
    "polar_anchor_tether": (POLAR | ANCHOR | TETHER, {}),
    "low_frequency_tether": (LOW | TETHER, {}),
    "seed_difference_tether": (SEEDS | TETHER, {}),
    "seed_difference_4_tether_148": (SEEDS_4 | TETHER, {"steps": 148}),
    "map_2": (DEFAULT | {"regression": {"steps": 2}}, {}),
    "map_8": (DEFAULT | {"regression": {"steps": 8}}, {}),
    "rank_4": (DEFAULT, {"rank": 4}),
    "rank_64": (DEFAULT, {"rank": 64}),
    "updates_150": (DEFAULT, {"steps": 150}),
    "updates_600": (DEFAULT, {"steps": 600}),
    "whole_weights": (DEFAULT, {"rank": 0, "lr": 2e-4}),
}


def config_of(variant: str, student: str) -> ConfigDict:
    """Training config of a variant. Raises: InputError for an unknown one, or no few-step student.

    student: folder of the patient.
    """
    if variant not in VARIANTS:
        raise InputError(f"variant: found {variant!r}; expected one of {', '.join(VARIANTS)}")
    objective, changes = VARIANTS[variant]
    config = read_config(["--config=repair"])
    config.objective = objective
    config.teacher, config.guidance = TEACHER, 4.0
    times = patient_times(assets.resolve(student))
    config.student.update(init=student, steps=len(times), timesteps=times)
    config.student.lora.rank = changes.get("rank", config.student.lora.rank)
    config.optim.lr = changes.get("lr", config.optim.lr)
    config.steps = config.optim.decay = changes.get("steps", UPDATES)
    config.data.update(prompts="asset:shapes_prompts.txt", length=16)
    config.remat, config.attention = "none", "jnp"  # 16 positions
    return config


def patient_times(folder: Path) -> tuple[float, ...]:
    """Times of a student's steps. Raises: InputError for a folder that is no few-step student's."""
    pipeline = make_pipeline(open_folder(folder, components=()))
    settings = few_step_settings(pipeline, read_sampling(folder, pipeline.sampling))
    if settings is None:
        raise InputError(f"{folder}: found no few-step student; expected an export of one")
    return settings[0]


def complete(run: Run, student: Any) -> Any:
    """Parameters of the network of a student's trained ones: its adapters merged."""
    base = run.base("student", run.frozen)
    return student if "student" not in run.bases else jax.device_get(merged(base, student))


@pinned_jax_config()
def run_variant(variant: str, student: str, seeds: int, out: Path, evaluate: Evaluator) -> None:
    """Train and evaluate all seeds of a variant, and write its row.

    Args:
      variant: one of VARIANTS.
      student: the patient.
      seeds: number of repairs, trained together.
      out: folder of the rows.
      evaluate: which caches the teacher's pictures.
    """
    config, started = config_of(variant, student), time.perf_counter()
    run = prepare(config)
    students, _ = train_seeds(run, range(seeds))
    trained = time.perf_counter()
    reports = [evaluate(config, complete(run, params)) for params in students]
    row = {
        "variant": variant,
        "config": as_json(config) | {"student": config.student.to_dict() | {"init": "patient"}},
        "runs": [report["metrics"] for report in reports],
        "teachers": {k: r["metrics"] for k, r in evaluate.teachers(config).items()},
        "evaluations": evaluations(run),
        "seconds": {"training": trained - started, "evaluation": time.perf_counter() - trained},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    write_atomic(out / f"{variant}.json", json.dumps(row) + "\n")


@pinned_jax_config()
def measure_patient(student: str, out: Path, evaluate: Evaluator) -> None:
    """Evaluate the patient as it is, and write its row."""
    config = config_of("regression", student)
    run = prepare(config)
    report = evaluate(config, jax.tree.map(np.asarray, run.base("student", run.frozen)))
    row = {"variant": "patient", "runs": [report["metrics"]]}
    write_atomic(out / "patient.json", json.dumps(row) + "\n")


_TEXT = """# Repairs

What adapters bring back on a student that distribution matching alone has made of the bundled flow
teacher (`configs/methods.py:dmd`, 800 updates, one seed: the patient). By

    python -m gadjax.experiments.repair_study STUDENT

A repair is 300 updates of 16 samples at guidance 4 without a critic, by the terms in its name along
a map of the teacher in 4 steps, of rank 16; rows that name no term have the default's, regression
and the tether (`configs/repair.py`, whose 600 updates are the row of that name). Evaluated on 64
prompts x 8 noises with 4 tangents each and a library of 128 noises. A cell is the mean over repairs
of different seeds of the same patient, with the half width of its 95 % interval over them
(Student's t). Evaluations are those of the network for a sample and update. "Seed difference" is
the loss of adapters that others publish, the cosine of differences between two seeds
(`SeedDifference`); 148 updates of it with a map of 4 steps cost what 300 of the default do.
Measured {dates} on a CPU.
"""


def write_table(out: Path) -> None:
    """Write README.md of the finished variants."""
    rows = {p.stem: json.loads(p.read_text()) for p in out.glob("*.json")}
    finished = [rows[name] for name in VARIANTS if name in rows]
    if not finished or "patient" not in rows:
        return
    dates = " to ".join(sorted({row["date"] for row in finished}))
    heads = ["", "runs", *METRICS.values(), "evaluations"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key, label in LABELS.items():
        cells = metric_cells([finished[0]["teachers"][key]])
        lines.append(f"| {' | '.join([label, '', *cells, ''])} |")
    for row in (rows["patient"], *finished):
        name, cost = row["variant"].replace("_", " "), row.get("evaluations")
        cells = [str(len(row["runs"])), *metric_cells(row["runs"]), f"{cost:.1f}" if cost else ""]
        lines.append(f"| {' | '.join([name, *cells])} |")
    missing = ", ".join(name for name in VARIANTS if name not in rows)
    lines += ["", f"Not run yet: {missing}.", ""] if missing else [""]
    write_atomic(out / "README.md", "\n".join([_TEXT.format(dates=dates), *lines]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", help="pipeline folder")
    parser.add_argument("variants", nargs="*", help="all of them by default")
    parser.add_argument("--seeds", type=int, default=3, help="of every variant, trained together")
    parser.add_argument("--out", type=Path, default=Path("docs/results/repair"))
    args = parser.parse_args()
    for variant in args.variants:
        config_of(variant, args.student)
    args.out.mkdir(parents=True, exist_ok=True)
    evaluate, student = Evaluator(), str(assets.resolve(args.student))
    if not (args.out / "patient.json").is_file():
        measure_patient(student, args.out, evaluate)
    for variant in args.variants or VARIANTS:
        if not (args.out / f"{variant}.json").is_file():
            run_variant(variant, student, args.seeds, args.out, evaluate)
            print(f"{variant}: done", flush=True)
        write_table(args.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"repair_study: {error}", file=sys.stderr)
        sys.exit(2)
