"""Study of objectives: each base with and without each term, several seeds of a cell at once.

    python -m gadjax.experiments.study [CELL ...] [--seeds 3] [--workers 1] [--budget SECONDS]
                                   [--out docs/results/study]

A cell is FAMILY/VARIANT, such as flow/dmd_polar_anchor or methods/rcm; without any, all of them are
done in order. A cell with a row in --out is finished. All inputs are bundled; nothing is
downloaded.
"""

import argparse
import json
import signal
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from gadjax.api import load
from gadjax.errors import InputError
from gadjax.experiments.study_cells import METHODS, STAGES, WITH_TERMS, cells, config_of
from gadjax.experiments.study_runs import Evaluator, evaluations, train_seeds
from gadjax.experiments.study_tables import row_path, write_tables
from gadjax.io.image_grid import grid, save_png
from gadjax.io.storage import write_atomic
from gadjax.models.adapters import merged
from gadjax.runtime.settings import pinned_jax_config
from gadjax.training.config import as_json
from gadjax.training.loop import train
from gadjax.training.setup import Run, prepare
from gadjax.training.steps import EARLIER


@pinned_jax_config()
def run_cell(cell: str, seeds: int, out: Path, evaluate: Evaluator) -> None:
    """Train and evaluate all seeds of a cell, and write its row and the first seed's pictures.

    Args:
      cell: FAMILY/VARIANT.
      seeds: number of students, trained together.
      out: folder of the rows.
      evaluate: of this process, which caches the teachers' pictures.
    """
    config, started = config_of(cell), time.perf_counter()
    with TemporaryDirectory() as folder:
        family, _, name = cell.partition("/")
        if family == METHODS and (stage := STAGES.get(name.removesuffix(WITH_TERMS))):
            before, setting = stage
            train(config_of(f"{METHODS}/{before}"), Path(folder) / before)
            config.student[setting] = str(Path(folder) / before)
        run = prepare(config)
        students, curves = train_seeds(run, range(seeds))
        evaluated = evaluations(run)
    trained = time.perf_counter()
    reports = [evaluate(config, complete(run, student)) for student in students]
    rows = evaluate.teachers(config) | {"student": reports[0]}
    row = {
        "cell": cell,
        "config": as_json(config_of(cell)),
        "seeds": list(range(seeds)),
        "teachers": {k: r["metrics"] for k, r in evaluate.teachers(config).items()},
        "runs": [report["metrics"] for report in reports],
        "evaluations": evaluated,
        "curves": curves,
        "seconds": {"training": trained - started, "evaluation": time.perf_counter() - trained},
        "device": jax.devices()[0].device_kind,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    path = row_path(out, cell)
    picture = grid([(row["label"], row["images"]) for row in rows.values()], None, scale=1)
    save_png(picture, path.with_suffix(".png"))
    write_atomic(path, json.dumps(row) + "\n")


def complete(run: Run, student: Any) -> Any:
    """Parameters of a run's student: adapters are merged with the teacher's float32 weights, and an
    earlier expert is beside it."""
    if run.config.student.lora.rank:
        teacher = load(run.config.teacher)
        return merged(jax.device_get(teacher.params[teacher.pipeline.backbone]), student)
    experts = run.frozen.get(EARLIER)
    return replace(experts, late=student) if experts else student


_evaluator: Evaluator | None = None  # of this process; caches the teachers' pictures


def work(cell: str, seeds: int, out: Path, until: float) -> tuple[str, str]:
    """Run a cell in a worker process, unless the clock is past `until`.

    Args:
      cell: FAMILY/VARIANT.
      seeds: number of students.
      out: folder of the rows.
      until: time.time() from which no cell is started.
    Returns: the cell, and the reason why it has no row, empty where it has one.
    """
    global _evaluator
    if time.time() > until:
        return cell, "not started, as the budget is spent"
    jax.config.update("jax_default_matmul_precision", "highest")  # a card's default is TF32
    _evaluator = _evaluator or Evaluator()
    try:
        run_cell(cell, seeds, out, _evaluator)
    except Exception as error:  # one cell's failure must not end the others
        return cell, f"{type(error).__name__}: {error}"
    return cell, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", help="FAMILY/VARIANT; all of them by default")
    parser.add_argument("--seeds", type=int, default=3, help="of every cell, trained together")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument(
        "--budget", type=float, default=1e9, help="seconds, after which no cell is started"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/study"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the workers too
    for cell in args.cells:
        config_of(cell)
    args.out.mkdir(parents=True, exist_ok=True)
    left = [c for c in args.cells or cells() if not row_path(args.out, c).is_file()]
    job = partial(work, seeds=args.seeds, out=args.out, until=time.time() + args.budget)
    started, failed = time.perf_counter(), 0
    with get_context("spawn").Pool(args.workers) as pool:
        for done, (cell, problem) in enumerate(pool.imap_unordered(job, left), 1):
            failed += bool(problem)
            seconds = time.perf_counter() - started
            print(f"{done}/{len(left)} {cell}: {problem or 'done'}, {seconds:.0f} s", flush=True)
    write_tables(args.out, cells())
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"study: {error}", file=sys.stderr)
        sys.exit(2)
