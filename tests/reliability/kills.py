"""Kill real runs with SIGKILL at random moments, start them again, compare what they end with.

    python tests/reliability/kills.py [--count 100] [--seed 0] [--out docs/results/reliability]

A chain is one workdir: killed about ten times, then left to finish. It has to end with the state,
the metrics and the previews of a run that nothing disturbed, bit for bit.
"""

import argparse
import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from figures import write_figures
from real_runs import (
    make_config,
    names,
    rows,
    sound,
    start,
    state_of,
    tail,
)

from gadjax.errors import InputError, RunStopped
from gadjax.runtime.status import HEALTH, read_status

STEPS, EVERY = 160, 10
PREVIEW = 30
PER_CHAIN = 10  # kills
# Where a kill is aimed, and how often: at any moment of a process's life, at the first seconds of
# its hold on the workdir, into a save, and at the moment in which a save is committed.
AIMS = {"anywhere": 5, "claim": 1, "save": 2, "commit": 2}
POLL_SECONDS = 0.002  # seconds between two looks for what a kill is aimed at
LIMIT = 900  # seconds until a process that does not end is a failure
CLOCKED = ("time", "images_per_second", "goodput")  # of a row of metrics: not of the training


class Failure(Exception):
    """Something that a kill must not do."""


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed, and how long its parts take in seconds. flags: of its own."""

    config: Path
    workdir: Path
    cache: Path
    steps: int
    cold: float  # up to the first step, where everything is compiled
    warm: float  # the same where nothing is
    step: float
    flags: tuple[str, ...] = ()

    def begin(self, workdir: Path, cache: Path | None = None) -> subprocess.Popen:
        """A process that trains in another workdir. cache: of compiled programs."""
        return start(
            cache or self.cache,
            workdir.with_suffix(".log"),
            *("train", "--config", self.config, "--workdir", workdir),
            f"--config.steps={self.steps}",
            "--config.batch=2",  # so that a run is mostly steps and saves, not its start
            f"--config.checkpoint.every={EVERY}",
            f"--config.preview.every={PREVIEW}",
            *self.flags,
        )


@dataclass
class Tally:
    """where: kills by what the workdir showed. behind: steps that the newest checkpoint lacked of
    those that were done, at most. failed: what a kill did that it must not."""

    kills: int = 0
    starts: int = 0
    chains: int = 0
    behind: int = 0
    where: Counter = field(default_factory=Counter)
    aims: Counter = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)


def undisturbed(folder: Path, steps: int = STEPS, flags: tuple[str, ...] = ()) -> Reference:
    """Two whole runs, the first with nothing compiled; they have to be equal themselves."""
    reference = Reference(
        make_config(folder), folder / "whole", folder / "cache", steps, 0, 0, 0, flags
    )
    seconds = []
    for workdir in (reference.workdir, folder / "again"):
        began = time.time()
        _finish(reference.begin(workdir), workdir)
        times = [row["time"] for row in rows(workdir)]
        seconds.append(times[0] - began)
    step = (times[-1] - times[0]) / (len(times) - 1)
    reference = replace(reference, cold=seconds[0], warm=seconds[1], step=step)
    compare(reference, folder / "again")
    return reference


def kill_many(reference: Reference, folder: Path, count: int, seed: int = 0) -> Tally:
    """`count` kills in chains below `folder`. Of several, the first has nothing compiled.

    A chain that fails stays where it is, the others are removed.
    """
    tally, rng = Tally(), np.random.default_rng(seed)
    while tally.kills < count and len(tally.failed) < 5:
        workdir = folder / f"chain{tally.chains:03d}"
        cold = tally.chains == 0 and count > PER_CHAIN
        most = min(PER_CHAIN, count - tally.kills)
        try:
            for line in _chain(
                reference, workdir, tally, rng, most, folder / "cold" if cold else None
            ):
                print(f"{workdir.name}  {line}", flush=True)
            compare(reference, workdir)
            shutil.rmtree(workdir)
        except Failure as error:
            tally.failed.append(f"{workdir.name}: {error}")
            print(f"FAILED {tally.failed[-1]}", flush=True)
        tally.chains += 1
    return tally


def _chain(reference, workdir, tally, rng, most, cache) -> Iterator[str]:
    for _ in range(most):
        aim = str(rng.choice(list(AIMS), p=np.array([*AIMS.values()]) / sum(AIMS.values())))
        newest = max(sound(workdir), default=0)
        ready = reference.cold if cache else reference.warm
        life = ready + (reference.steps - newest) * reference.step
        began = time.time()
        process = reference.begin(workdir, cache)
        tally.starts += 1
        try:
            moments = _moments(workdir, aim, rng, life)
            while process.poll() is None and next(moments):
                time.sleep(POLL_SECONDS)
                if time.time() - began > LIMIT:
                    raise Failure(f"still running after {LIMIT} s: {tail(_log(workdir))}")
        finally:
            process.kill()
            process.wait()
        if process.returncode == 0:
            yield "ended before its kill"
            return
        if process.returncode != -signal.SIGKILL:
            raise Failure(f"exit {process.returncode}: {tail(_log(workdir))}")
        tally.kills += 1
        where, behind = _interrupted_in(workdir, began, newest)
        tally.where[where] += 1
        tally.aims[aim] += 1
        tally.behind = max(tally.behind, behind)
        steps = max(sound(workdir), default=0)
        yield f"kill {tally.kills} ({aim}) in {where}: {steps} saved, {behind} behind"
    tally.starts += 1
    _finish(reference.begin(workdir, cache), workdir)
    yield "left to end"


def _moments(workdir: Path, aim: str, rng, life: float) -> Iterator[bool]:
    """True until the moment to kill."""
    folder, lock = workdir / "checkpoints", workdir / "lock"
    until, skip = time.time() + rng.uniform(0, life), int(rng.integers(3))
    if aim != "anywhere":
        held = lock.stat().st_mtime_ns if lock.exists() else 0
        there = set(names(folder))
        candidates: set[str] = set()
        while True:
            if aim == "claim":
                found = lock.exists() and lock.stat().st_mtime_ns != held
            else:
                new = set(names(folder)) - there
                candidates |= {name for name in new if name.isdigit() == (aim == "commit")}
                found = len(candidates) > skip
            if found:
                break
            yield True
        until = time.time() + rng.uniform(0, {"claim": 0.1, "save": 0.1, "commit": 0.02}[aim])
    while time.time() < until:
        yield True
    yield False


def _interrupted_in(workdir: Path, began: float, newest: int) -> tuple[str, int]:
    """(where a kill hit, how many steps were done and are to be done again).

    began: the process. newest: checkpoint before it. Raises: Failure for a file that was not left
    whole, and for steps lost that had to be kept.
    """
    for path in workdir.glob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise Failure(f"{path.name} is not whole after a kill: {error}") from error
    if (workdir / "config.json").exists():
        try:
            read_status(workdir)
        except (InputError, RunStopped) as error:
            raise Failure(f"gadjax status: {error}") from error
    logged = [row["step"] for row in rows(workdir) if row["time"] >= began]
    done = max([newest, *logged])
    saved = max(sound(workdir), default=0)
    # Saved before this process, or at most one save in flight and one interval behind it.
    if not max(newest, done - 2 * EVERY) <= saved <= done:
        raise Failure(f"step {saved} is the latest valid one after {newest}, {done} in the metrics")
    if any(".orbax-checkpoint-tmp" in name for name in names(workdir / "checkpoints")) and logged:
        return "save", done - saved
    return "step" if logged else "start-up", done - saved


def compare(reference: Reference, workdir: Path) -> None:
    """Raises: Failure where an ended run differs from the undisturbed one."""
    status = json.loads((workdir / "status.json").read_text())
    if (status["status"], status["step"]) != ("done", reference.steps):
        raise Failure(f"ended with {status}")
    steps = [row["step"] for row in rows(workdir)]
    if steps != list(range(1, reference.steps + 1)):
        lost = sorted(set(range(1, reference.steps + 1)) - set(steps))
        raise Failure(f"metrics.jsonl: {len(steps)} rows, without steps {lost}")
    for one, other in zip(_losses(workdir), _losses(reference.workdir), strict=True):
        if one != other:
            raise Failure(f"metrics.jsonl: {one}, undisturbed {other}")
    if state_of(workdir) != state_of(reference.workdir):
        raise Failure(f"another state than {reference.workdir}")
    for name in ("checkpoints", "previews"):
        one, other = names(workdir / name), names(reference.workdir / name)
        if one != other:
            raise Failure(f"{name}: found {one}; expected {other}")
    for path in (reference.workdir / "previews").iterdir():
        if (workdir / "previews" / path.name).read_bytes() != path.read_bytes():
            raise Failure(f"previews/{path.name} differs")
    if (workdir / HEALTH).read_bytes() != (reference.workdir / HEALTH).read_bytes():
        raise Failure(f"{HEALTH} differs")


def _losses(workdir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows(workdir)]


def _log(workdir: Path) -> Path:
    return workdir.with_suffix(".log")


def _finish(process: subprocess.Popen, workdir: Path) -> None:
    try:
        if process.wait(LIMIT):
            raise Failure(f"exit {process.returncode}: {tail(_log(workdir))}")
    except subprocess.TimeoutExpired as error:
        raise Failure(f"still running after {LIMIT} s: {tail(_log(workdir))}") from error
    finally:
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began, folder = time.time(), Path(tempfile.mkdtemp(prefix="gadjax-kills-"))
    reference = undisturbed(folder)
    print(
        f"start {reference.warm:.1f} s ({reference.cold:.1f} s cold), step {reference.step:.3f} s",
        flush=True,
    )
    tally = kill_many(reference, folder, args.count, args.seed)
    figures = {
        "kills": tally.kills,
        **{f"kills_in_{name}": tally.where[name] for name in ("start-up", "step", "save")},
        **{f"aimed_{name}": tally.aims[name] for name in AIMS},
        "starts": tally.starts,
        "chains": tally.chains,
        "chains_that_differ": len(tally.failed),
        "failures": "; ".join(tally.failed),
        "most_steps_done_again": tally.behind,
        "steps": reference.steps,
        "checkpoint_every": EVERY,
        "start_seconds": round(reference.warm, 2),
        "cold_start_seconds": round(reference.cold, 2),
        "step_seconds": round(reference.step, 4),
        "state": state_of(reference.workdir),
    }
    if args.out:
        print(write_figures("kills", args.out, began, figures))
    print(json.dumps(figures, indent=2))
    if not tally.failed:
        shutil.rmtree(folder)
    return bool(tally.failed)


if __name__ == "__main__":
    raise SystemExit(main())
