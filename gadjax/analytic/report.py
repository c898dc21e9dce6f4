"""Training of the comparison's rows, one file each, and their page."""

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax

from gadjax.analytic.bench import Bench
from gadjax.analytic.fit import train
from gadjax.analytic.result import Result, metrics_table
from gadjax.analytic.rows import (
    NOT_HERE,
    SECTIONS,
    SETTINGS,
    TEACHER_AND_START,
    Row,
    Still,
    all_rows,
    row_name,
)
from gadjax.analytic.teachers import posterior_map
from gadjax.errors import InputError, RunStopped
from gadjax.io.storage import write_atomic
from gadjax.io.untrusted import read_json
from gadjax.seeds import make_key
from gadjax.types import Params

MARKER = "<!-- From here on `python -m gadjax.analytic` writes this page. -->"
TITLE = f"# Closed-form teachers\n\n{MARKER}\n"


def row_path(out: Path, name: str) -> Path:
    """File of a row."""
    return out / f"{name}.json"


def recipe(name: str, updates: int, seeds: int) -> dict[str, Any]:
    """Settings on which a row's numbers depend, beside the code."""
    _, label, row = all_rows()[name]
    return {"row": name, "label": label, "of": repr(row), "updates": updates, "seeds": seeds}


def finished(out: Path, name: str, expected: Mapping[str, Any]) -> dict[str, Any] | None:
    """Record of a row that has been run; None for one that has not.

    Raises: InputError for the record of another recipe.
    """
    path = row_path(out, name)
    if not path.is_file():
        return None
    record = read_json(path)
    for key, value in expected.items():
        if record.get(key) != value:
            raise InputError(
                f"{path}: found {key} {record.get(key)!r}; expected {value!r} (remove the file, or "
                "choose another --out)"
            )
    return record


def run_row(name: str, updates: int, seeds: int) -> dict[str, Any]:
    """Train a row's students and measure them.

    Args:
      name: SETTING/LABEL.
      updates: student updates of a run.
      seeds: runs.

    Returns: the row's record. A run whose updates are not finite ends it, and is its `problem`.
    """
    setting, label, row = all_rows()[name]
    bench = bench_of(setting, tuple(row.bench.items()))
    begun, runs, problem = time.perf_counter(), [], ""
    try:
        if row.objective is None:
            runs = [untrained(bench, setting, label)]
        for seed in range(seeds if row.objective else 0):
            runs.append(fit_row(bench, setting, row, updates, seed))
    except RunStopped as error:
        problem = str(error)
    train.clear_cache()
    return recipe(name, updates, seeds) | {
        "runs": [result.metrics for result in runs],
        "problem": problem,
        "seconds": round(time.perf_counter() - begun, 1),
        "device": jax.devices()[0].device_kind,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


@cache
def bench_of(setting: str, changes: tuple[tuple[str, Any], ...]) -> Bench:
    """A setting's bench, once: its rows share the exact map and compiled measurements.

    Args:
      setting: its name.
      changes: fields that differ.
    """
    return replace(SETTINGS[setting].bench(), **dict(changes))


def start_of(bench: Bench, setting: str) -> Params | None:
    """Initial parameters of a setting's students; None for random ones."""
    make = SETTINGS[setting].start
    return make(bench) if make else None


def untrained(bench: Bench, setting: str, label: str) -> Result:
    """The teacher against itself, which is the metrics' error, or the untrained student."""
    if label == "teacher":
        alpha, sigma = (float(v) for v in bench.schedule.alpha_sigma(bench.times[0]))
        ode = partial(posterior_map, bench.teacher.posterior, alpha=alpha, sigma=sigma, steps=128)
        return bench.measure(lambda _, z: ode(z))
    start = start_of(bench, setting)
    return bench.measure(bench.draw, bench.init(make_key(0)) if start is None else start)


def fit_row(bench: Bench, setting: str, row: Row, updates: int, seed: int) -> Result:
    """One student of a row, with the stages before it.

    Args:
      bench: teacher and student.
      setting: its name.
      row: what is trained.
      updates: student updates, of a first stage too.
      seed: of the run.
    """
    start = start_of(bench, setting)
    if row.first:
        start = bench.fit(row.first, updates, seed, start).params
    networks = {
        f"degraded/{i}": bench.fit(Still(), max(1, round(share * updates)), seed, start).critic
        for i, share in enumerate(row.degraded)
    }
    return bench.fit(row.objective, updates, seed, start, networks)


def write_page(out: Path, updates: int, seeds: int) -> Path:
    """Write the page of the rows that have been run, below what it says above `MARKER`.

    Args:
      out: folder of the rows; the page is beside it.
      updates, seeds: of the rows.
    """
    page = out.with_suffix(".md")
    head = page.read_text() if page.is_file() else TITLE
    if MARKER not in head:
        raise InputError(f"{page}: found no line {MARKER!r}; expected one above the tables")
    records = {
        name: record
        for name in all_rows()
        if (record := finished(out, name, recipe(name, updates, seeds)))
    }
    parts = [head.partition(MARKER)[0] + MARKER, summary(records.values(), updates, seeds)]
    for setting, title, rows in SECTIONS:
        full = SETTINGS[setting].title
        parts += [f"## {full}: {title}" if title else f"## {full}", section(setting, rows, records)]
    write_atomic(page, "\n\n".join(parts) + "\n")
    return page


def summary(records: Collection[Mapping], updates: int, seeds: int) -> str:
    """Paragraph on how the rows were run.

    Args:
      records: of the rows that have been run.
      updates, seeds: of each.
    """
    devices, dates = (sorted({r[key] for r in records}) for key in ("device", "date"))
    minutes = sum(record["seconds"] for record in records) / 60
    reasons = "; ".join(f"`{name}` {reason}" for name, reason in NOT_HERE.items())
    return (
        f"Mean of {seeds} runs (and their range), {updates} updates each: "
        f"{len(records)} of {len(all_rows())} rows, {minutes:.0f} minutes on {', '.join(devices)}, "
        f"{' to '.join(dates)}. Terms without a row: {reasons}."
    )


def section(setting: str, rows: Mapping[str, Row], records: Mapping[str, dict]) -> str:
    """Table of a section's finished rows, and the names of the others."""
    named = {row_name(setting, label): label for label in TEACHER_AND_START | dict(rows)}
    done = {label: records[name] for name, label in named.items() if name in records}
    parts = [metrics_table({label: record["runs"] for label, record in done.items()})] * bool(done)
    parts += [f"{label}: {r['problem']}." for label, r in done.items() if r["problem"]]
    if left := [label for name, label in named.items() if name not in records]:
        parts.append(f"Not run yet: {', '.join(left)}.")
    return "\n\n".join(parts)
