"""Alarms of previews on good runs and on runs that are made to fail.

    python -m gadjax.experiments.alarms RUNS [CASE ...] [--seeds 3] [--out docs/results/alarms]

Trains the quickstart's student in short runs, a preview every EVERY steps. RUNS gets a workdir for
each case and seed; a finished one is not trained again. The table says where the alarms came, and
where the loss had risen.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gadjax.errors import InputError, check_choice
from gadjax.io.storage import write_atomic
from gadjax.runtime.status import HEALTH, OF_TEACHER, parse_health
from gadjax.training.config import changed_config, read_config
from gadjax.training.health import BANDS, GUIDANCE, judge
from gadjax.training.loop import train

STEPS, EVERY = 80, 10
RISE = 1.5  # of a loss over its least value so far, both means of WINDOW rows
WINDOW = 5
FAST = {"optim": {"lr": 5e-3}, "critic": {"lr": 1e-2}}
# Variant of configs/shapes_gad.py, and changes that make the run fail.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "good": ("quickstart", {}),
    "rate": ("quickstart", FAST),
    "guidance": ("quickstart", {"guidance": 16.0}),
    "no_anchor": ("dmd", {}),
    # DMD alone, and a critic that stays what it began as, the teacher without guidance: the
    # student's loss then has nothing that holds its pictures apart.
    "still_critic": ("dmd", {"critic": {"lr": 1e-7, "updates": 1}}),
}
SHORT = {
    "steps": STEPS,
    "batch": 8,
    "optim": {"lr": 3e-4, "decay": STEPS},
    "critic": {"lr": 6e-4},
    "ema": 0.98,
    "checkpoint": {"every": STEPS},
    "preview": {"every": EVERY},
    "log": {"every": 2},
}


def config_of(case: str, seed: int) -> ConfigDict:
    """Training config of a case. Raises: InputError for an unknown one."""
    check_choice("case", case, CASES)
    variant, changes = CASES[case]
    config = read_config([f"--config=shapes_gad:{variant}"])
    return changed_config(changed_config(config, SHORT | {"seed": seed}), changes)


def read_run(workdir: Path) -> dict[str, Any]:
    """Signals and losses of a run: rows by step, first alarm of each signal, first rise of a loss.

    The alarms are judged anew, by the bands of today.
    """
    lines = (workdir / HEALTH).read_text().splitlines()
    rows, best, alarms = [row for row in map(parse_health, lines) if row], {}, {}
    for row in rows:
        for name in judge(row, best):
            alarms.setdefault(name, row["step"])
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rises = {name: first_rise(logged, name) for name in ("student/loss", "dmd/gap", "critic/loss")}
    return {"rows": rows, "alarms": alarms, "rises": {k: v for k, v in rises.items() if v}}


def first_rise(logged: list[dict[str, Any]], name: str) -> int | None:
    """First step at which a loss's mean over WINDOW rows is RISE times its least such mean so far,
    or is not finite; None where it never is."""
    values = np.array([np.nan if row.get(name) is None else row[name] for row in logged])
    if len(values) < WINDOW or not any(name in row for row in logged):
        return None
    means = np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")
    least = np.fmin.accumulate(means)
    risen = np.flatnonzero(~(means <= RISE * least))
    return logged[risen[0] + WINDOW - 1]["step"] if len(risen) else None


_TEXT = """# Alarms

Where the alarms of previews came ([monitoring](../../monitoring.md)), on runs that are sound and on
runs that were made to fail. By

    python -m gadjax.experiments.alarms RUNS [CASE ...] [--seeds N]

{steps} steps of 8 samples of the bundled flow teacher, a preview of 4 prompts x 4 noises every
{every}. good: the quickstart's config; rate: its learning rates times 17; guidance: 16 in place of
4; no_anchor: DMD alone; still_critic: DMD alone, with a critic that does not learn. A cell is the
step of the first alarm of each seed, "-" where none came, "." where the signal was not measured (a
run without preview.features). A loss has risen where its mean over {window} logged rows is {rise}
times its least one so far. Measured {date} on a CPU.
"""


def write_table(runs: Path, out: Path) -> None:
    """Write README.md of the finished runs: first alarms, and values at the last preview."""
    finished = {
        case: [read_run(path) for path in sorted(runs.glob(f"{case}-[0-9]*")) if is_done(path)]
        for case in CASES
    }
    finished = {case: case_runs for case, case_runs in finished.items() if case_runs}
    losses = list(dict.fromkeys(k for f in finished.values() for run in f for k in run["rises"]))
    raised = {name for f in finished.values() for run in f for name in run["alarms"]}
    names = [*BANDS, *sorted(name for name in raised if name.startswith(GUIDANCE))]
    lines = ["", "## First alarm", "", _line(["", "seeds", *names, *losses])]
    lines.append("|---" * (len(names) + len(losses) + 2) + "|")
    for case, case_runs in finished.items():
        cells = [" ".join(str(_first_alarm(run, n)) for run in case_runs) for n in names]
        cells += [" ".join(str(run["rises"].get(n, "-")) for run in case_runs) for n in losses]
        lines.append(_line([case, str(len(case_runs)), *cells]))
    lines += ["", "## Values, mean over seeds", ""]
    lines += [_line(["", "step", *BANDS]), "|---" * (len(BANDS) + 2) + "|"]
    for case, case_runs in finished.items():
        last = [run["rows"][-1] for run in case_runs]
        cells = [_mean(last, name + OF_TEACHER) for name in BANDS]
        lines.append(_line([f"{case}: teacher", "", *cells]))
        for number in (0, len(case_runs[0]["rows"]) // 2, -1):
            rows = [run["rows"][number] for run in case_runs]
            cells = [_mean(rows, name) for name in BANDS]
            lines.append(_line([case, str(rows[0]["step"]), *cells]))
    facts = {"steps": STEPS, "every": EVERY, "window": WINDOW, "rise": RISE}
    text = _TEXT.format(date=datetime.now(UTC).strftime("%Y-%m-%d"), **facts)
    write_atomic(out / "README.md", "\n".join([text.rstrip(), *lines, ""]))


def is_done(workdir: Path) -> bool:
    """True for a workdir whose run has all its previews, or was stopped with some."""
    status = workdir / "status.json"
    return status.is_file() and json.loads(status.read_text())["status"] in ("done", "stopped")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _first_alarm(run: dict[str, Any], name: str) -> int | str:
    """Step of a signal's first alarm, "-" where none came, "." where it was not measured."""
    measured = name.startswith(GUIDANCE) or name in run["rows"][0]
    return run["alarms"].get(name, "-" if measured else ".")


def _mean(rows: list[dict[str, Any]], name: str) -> str:
    """Mean of a signal over the rows that have it; "" for none."""
    values = [row[name] for row in rows if name in row]
    if None in values:
        return "not finite"
    return f"{np.mean(values):.3f}" if values else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of the workdirs")
    parser.add_argument("cases", nargs="*", help="all of them by default")
    parser.add_argument("--seeds", type=int, default=3, help="of every case")
    parser.add_argument("--out", type=Path, default=Path("docs/results/alarms"))
    args = parser.parse_args()
    cases = args.cases or list(CASES)
    configs = {(c, s): config_of(c, s) for s in range(args.seeds) for c in cases}
    args.out.mkdir(parents=True, exist_ok=True)
    for (case, seed), config in configs.items():
        workdir = args.runs / f"{case}-{seed}"
        if not is_done(workdir):
            train(config, workdir)
            print(f"{case}, seed {seed}: done", flush=True)
        write_table(args.runs, args.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"alarms: {error}", file=sys.stderr)
        sys.exit(2)
