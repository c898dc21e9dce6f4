"""Kill real `gadjax convert`, `export`, `lora` and `embed` while they replace a folder.

    python tests/reliability/atomic.py [--count 60] [--seed 0] [--out docs/results/reliability]

After every kill the folder has to be the old one bit for bit, or the complete new one.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from figures import write_figures
from real_runs import start, tail, write_pipeline
from workdirs import make_workdir

from gadjax.formats.orbax_folder import PARAMS, is_gadjax_folder, read_gadjax_folder

# Where kills are aimed, in turn: at any moment of a process's life, at the writing, and at the
# moment in which the folders change places.
AIMS = "writing", "swap", "anywhere", "writing", "swap"
POLL_SECONDS = 0.0005  # seconds between two looks for what a kill is aimed at
LIMIT = 300  # seconds until a process that does not end is a failure
Files = dict[str, bytes]


class Failure(Exception):
    """Something that a kill must not do."""


@dataclass
class Job:
    """A command that writes the first or the second of two contents into a folder."""

    name: str
    arguments: Callable[[Path, int], list]
    replaces: bool = True
    contents: list[Files] = field(default_factory=list)
    life: float = 0.0  # seconds that it takes, of which
    writing: float = 0.0


@dataclass
class Tally:
    found: Counter = field(default_factory=Counter)  # old, new
    aims: Counter = field(default_factory=Counter)
    by_job: Counter = field(default_factory=Counter)
    kills: int = 0
    ended: int = 0  # before they were killed
    left: int = 0
    removed: int = 0  # of what was left, by a later start
    failed: list[str] = field(default_factory=list)


def make_jobs(folder: Path) -> list[Job]:
    tiny = write_pipeline(folder / "tiny")
    run = make_workdir(folder / "run", tiny)
    adapted = make_workdir(folder / "adapted", tiny, student={"lora": {"rank": 2}})
    student, lora = folder / "student", folder / "lora"
    _undisturbed(["export", "--workdir", run, "--out", student], folder)
    _undisturbed(["lora", "extract", tiny, student, "--rank", 2, "--out", lora], folder)
    prompts = folder / "prompts.txt"
    prompts.write_text("red circle\ngreen square\n" * 20)
    converted = folder / "own"
    _undisturbed(["convert", tiny, converted], folder)
    dtypes, parts = ("float32", "bfloat16"), ("--ema", "--no-ema")
    exported = ["export", "--workdir", run, "--overwrite", "--out"]
    texts = ["embed", "--model", tiny, "--prompts", prompts, "--length", 8, "--batch", 1]
    return [
        Job("convert", lambda out, n: ["convert", tiny, out, "--overwrite", "--dtype", dtypes[n]]),
        Job(
            "back", lambda out, n: ["convert", converted, out, "--overwrite", "--dtype", dtypes[n]]
        ),
        Job("export", lambda out, n: [*exported, out, parts[n]]),
        Job("single", lambda out, n: [*exported, out, parts[n], "--single-file"]),
        Job(
            "lora",
            lambda out, n: [
                *("export", "--workdir", adapted, "--lora", parts[n]),
                *("--overwrite", "--out", out),
            ],
        ),
        Job(
            "extract",
            lambda out, n: [
                *("lora", "extract", tiny, student, "--rank", 2 + n),
                *("--overwrite", "--out", out),
            ],
        ),
        Job(
            "merge",
            lambda out, n: [
                *("lora", "merge", tiny, f"{lora}:{1 - n / 2}"),
                *("--overwrite", "--out", out),
            ],
        ),
        Job("embed", lambda out, n: [*texts, "--out", out], replaces=False),
    ]


def measure(job: Job, folder: Path) -> None:
    """What it writes both times, how long that takes; the second content stays."""
    dst = _dst(job, folder)
    for number in range(1 + job.replaces):
        begin = time.monotonic()
        writing = _undisturbed(job.arguments(dst, number), folder, dst)
        job.life, job.writing = time.monotonic() - begin, writing
        job.contents.append(content(dst))
    if job.replaces and job.contents[0] == job.contents[1]:
        raise Failure(f"{job.name}: the same twice, so that nothing would be noticed")
    if not job.replaces:
        shutil.rmtree(dst)


def kill_many(jobs: list[Job], folder: Path, count: int, seed: int = 0) -> Tally:
    """`count` kills of the jobs in turn, then each once to its end. They are `measure`d."""
    rng, tally = np.random.default_rng(seed), Tally()
    holds = {job.name: 1 for job in jobs}  # which of the contents
    for number in range(2 * count):
        if tally.kills == count:
            break
        job, aim = jobs[number % len(jobs)], AIMS[number // len(jobs) % len(AIMS)]
        try:
            holds[job.name] = _kill(job, holds[job.name], aim, folder, rng, tally)
        except Failure as failure:
            tally.failed.append(f"{job.name}, {aim}: {failure}")
        print(f"{number + 1}: {job.name}, {aim}: {dict(tally.found)} {tally.failed}", flush=True)
    for job in jobs:
        dst, left = _dst(job, folder), _left(_dst(job, folder))
        _undisturbed(job.arguments(dst, 0), folder)
        tally.removed += len(left) - len(_left(dst))
        if content(dst) != job.contents[0] or _left(dst):
            tally.failed.append(f"{job.name}: ended with another folder, or left something")
    return tally


def _kill(job: Job, holds: int, aim: str, folder: Path, rng, tally: Tally) -> int:
    """Which content the folder has afterwards. Raises: Failure."""
    dst, new = _dst(job, folder), 1 - holds if job.replaces else 0
    before, left = _bytes(dst), _left(dst)
    log = folder / f"{job.name}.log"
    process = start(folder / "compiled", log, *job.arguments(dst, new))
    for now in _moments(job, dst, aim, rng):
        if now or process.poll() is not None:
            break
    process.kill()
    if process.wait() > 0:
        raise Failure(tail(log))
    killed = process.returncode < 0
    if killed:
        tally.kills += 1
        tally.aims[aim] += 1
        tally.by_job[job.name] += 1
    else:
        tally.ended += 1
    after, stays = _bytes(dst), _left(dst)
    tally.removed += len(left - stays)
    tally.left += len(stays - left)
    if len(stays) > 1:
        raise Failure(f"more than one left behind: {sorted(stays)}")
    if after == before and killed:
        tally.found["old"] += 1
        return holds
    if content(dst) != job.contents[new]:
        raise Failure(f"neither the old nor the new: {sorted(after)}")
    tally.found["new"] += killed
    if not job.replaces:
        shutil.rmtree(dst)
    return new


def _moments(job: Job, dst: Path, aim: str, rng) -> Iterator[bool]:
    """Waits a little at a time; True is the moment to kill."""
    begin, was = time.monotonic(), _identity(dst)
    until = rng.uniform(0, job.life) if aim == "anywhere" else None
    known = _left(dst)
    while time.monotonic() - begin < LIMIT:
        if aim == "swap" and _identity(dst) != was:
            until = 0.0
        elif aim == "writing" and until is None and _left(dst) - known:
            until = time.monotonic() - begin + rng.uniform(0, 1.1 * job.writing)
        yield until is not None and time.monotonic() - begin >= until
        time.sleep(POLL_SECONDS)
    raise Failure(f"no end in {LIMIT} s")


def content(folder: Path) -> Files:
    """Content of a folder. Orbax names and packs its files differently each time: reading the
    parameters that it keeps compares their fingerprints with those in the manifest."""
    files = _bytes(folder)
    if not is_gadjax_folder(folder):
        return files
    read_gadjax_folder(folder)
    return {name: data for name, data in files.items() if not name.startswith(f"{PARAMS}/")}


def _bytes(folder: Path) -> Files:
    """Every file by its path; nothing where there is no folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _dst(job: Job, folder: Path) -> Path:
    return folder / f"of {job.name}" / "out"


def _left(dst: Path) -> set[str]:
    """What lies beside a folder."""
    return {path.name for path in dst.parent.glob("*")} - {dst.name}


def _identity(dst: Path) -> int:
    try:
        return dst.stat().st_ino
    except OSError:
        return 0


def _undisturbed(arguments: list, folder: Path, dst: Path | None = None) -> float:
    """A command that nothing disturbs: seconds from its first file beside `dst` to its end.

    Raises: Failure.
    """
    log, first = folder / "whole.log", None
    process = start(folder / "compiled", log, *arguments)
    while process.poll() is None:
        if dst is not None and first is None and _left(dst):
            first = time.monotonic()
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise Failure(tail(log))
    return time.monotonic() - (first or time.monotonic())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began, folder = time.time(), Path(tempfile.mkdtemp(prefix="gadjax-atomic-"))
    jobs = make_jobs(folder)
    for job in jobs:
        measure(job, folder)
        print(f"{job.name}: {job.life:.1f} s, writing {job.writing:.2f} s", flush=True)
    tally = kill_many(jobs, folder, args.count, args.seed)
    figures = {
        "kills": tally.kills,
        "ended_before_the_kill": tally.ended,
        "old": tally.found["old"],
        "new": tally.found["new"],
        **{f"of_{job.name}": tally.by_job[job.name] for job in jobs},
        **{f"aimed_{name}": tally.aims[name] for name in sorted(set(AIMS))},
        "left_behind": tally.left,
        "removed_by_the_next": tally.removed,
        "failed": len(tally.failed),
        "failures": "; ".join(tally.failed),
        **{f"seconds_of_{job.name}": round(job.life, 2) for job in jobs},
    }
    if args.out:
        print(write_figures("atomic", args.out, began, figures))
    print(json.dumps(figures, indent=2))
    if not tally.failed:
        shutil.rmtree(folder)
    return bool(tally.failed)


if __name__ == "__main__":
    raise SystemExit(main())
