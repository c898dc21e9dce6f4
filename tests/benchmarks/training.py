"""Training runs on this device: the quickstart's, and the main rows of the study."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from benchmarks.common import Figure

from gadjax.cli.main import main as gadjax
from gadjax.experiments.study_tables import METRICS, row_path
from gadjax.runtime.status import read_status

# The most informative first: which term does what, and at which price.
STUDY_CELLS = (
    "flow/dmd_polar_anchor",
    "flow/dmd_none",
    "flow/regression_none",
    "flow/dmd_reg",
    "flow/dmd_polar",
    "flow/dmd_anchor",
    "flow_2_steps/dmd_polar_anchor",
    "flow_2_steps/dmd_none",
)


def quickstart(*overrides: str) -> Iterator[Figure]:
    """Seconds of the quickstart's training: to the first step's start, of all steps, in all."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = ["train", "--config", "configs/shapes_gad.py:quickstart"]
        begin = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):  # the table of figures is on stdout
            code = gadjax([*command, "--workdir", str(workdir), *overrides])
        taken = time.perf_counter() - begin
        if code:
            raise RuntimeError(f"gadjax train: found exit code {code}; expected 0")
        status = read_status(workdir)
    note = f"{status['steps']} steps"
    compiling = status["seconds"]["compile"]
    yield Figure("quickstart's training, seconds", taken, note=note)
    yield Figure("of these: until the first step is compiled", compiling, note=note)
    yield Figure("of these: in steps", status["seconds"]["step"], note=note)
    yield Figure("images per second at the end", status["images_per_second"], note=note)


def study(cells: tuple[str, ...], seeds: int, budget: float, out: Path) -> Iterator[Figure]:
    """Rows of the study that are finished within the budget; those in `out` already are.

    Args:
      cells: FAMILY/VARIANT, the most informative first.
      seeds: of each cell, trained in one program.
      budget: seconds after which no cell is started.
      out: folder of the rows and their pictures.
    """
    command = [sys.executable, "-m", "gadjax.experiments.study", *cells]
    command += ["--seeds", str(seeds), "--budget", str(budget), "--out", str(out)]
    subprocess.run(command, stdout=sys.stderr)  # fails where a cell has no row, which is printed
    finished = [cell for cell in cells if row_path(out, cell).is_file()]
    yield Figure("cells finished", float(len(finished)), note=f"of {len(cells)}, rows in {out}")
    for cell in finished:
        row = json.loads(row_path(out, cell).read_text())
        note = f"{len(row['runs'])} seeds"
        yield Figure(f"{cell}: seconds of training", row["seconds"]["training"], note=note)
        for metric, name in METRICS.items():
            values = [run[metric] for run in row["runs"]]
            spread = f"{note}, from {min(values):.3f} to {max(values):.3f}"
            yield Figure(f"{cell}: {name}", float(np.mean(values)), note=spread)
