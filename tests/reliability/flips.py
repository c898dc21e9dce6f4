"""Flip bits, cut and remove files of real checkpoints: every time it has to be noticed.

    python tests/reliability/flips.py [--count 200] [--seed 0] [--out docs/results/reliability]

A run leaves three checkpoints. Each damage is done to one file of the newest; then the run's
checkpoints are restored as a resume does, which has to name the file and to give the bits of the
step before.
"""

import argparse
import logging
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from figures import write_figures
from jax.sharding import SingleDeviceSharding
from real_runs import make_config, start, tail

from gadjax.checkpoints.checkpoint import Checkpoints
from gadjax.checkpoints.steps import committed_steps


@dataclass(frozen=True)
class Damage:
    """name: of the file in its step. place: the bit that flips, or the bytes that stay."""

    kind: str
    name: str
    place: int

    def do(self, step: Path) -> None:
        path = step / self.name
        if self.kind == "deletion":
            return path.unlink()
        data = bytearray(path.read_bytes())
        if self.kind == "flip":
            data[self.place // 8] ^= 1 << self.place % 8
        path.write_bytes(data if self.kind == "flip" else data[: self.place])


KINDS = "flip", "truncation", "deletion"


def draw(step: Path, count: int, seed: int) -> list[Damage]:
    """Kinds in turn; files and places at random, every file as likely as another."""
    rng = random.Random(seed)
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    found = []
    for number in range(count):
        path = rng.choice(files)
        kind, size = KINDS[number % len(KINDS)], path.stat().st_size
        place = rng.randrange(8 * size if kind == "flip" else size)
        found.append(Damage(kind, path.relative_to(step).as_posix(), place))
    return found


def shapes(step: Path) -> dict:
    """What a step holds, to be restored onto one device."""
    home = SingleDeviceSharding(jax.devices()[0])
    tree = ocp.PyTreeCheckpointHandler().metadata(step / "state").tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), tree)


def bits(state: dict) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def restore(folder: Path, abstract: dict) -> tuple[int, list[bytes], list[str]]:
    """Step that a resume restores, its bits, and the log lines about others."""
    reported, log = _Lines(), logging.getLogger("gadjax")
    log.addHandler(reported)
    checkpoints = Checkpoints(folder)
    try:
        step, state, _ = checkpoints.restore(abstract)
    finally:
        checkpoints.close()
        log.removeHandler(reported)
    return step, bits(state), reported.lines


def damage_many(
    folder: Path, count: int, seed: int = 0, note: Callable[[str], None] = lambda line: None
) -> tuple[Counter, list[str]]:
    """(damages by kind, what was not as it must be). folder: of checkpoints, which are as before in
    the end."""
    newest, before = committed_steps(folder)[:2]
    step, intact = folder / str(newest), folder.with_name("whole")
    shutil.copytree(step, intact)
    abstract = shapes(step)
    shutil.move(step, step.with_name("away"))
    expected = restore(folder, abstract)
    shutil.rmtree(step.with_name("away"))
    if expected[0] != before or expected[2]:
        raise AssertionError(expected[::2])
    done, failures = Counter(), []
    for damage in draw(intact, count, seed):
        shutil.copytree(intact, step)
        damage.do(step)
        found, same, lines = restore(folder, abstract)
        named = len(lines) == 1 and str(step) in lines[0] and damage.name in lines[0]
        if (found, same) != expected[:2] or not named or "\n" in "".join(lines):
            failures.append(f"{damage}: restored {found}, logged {lines}")
        shutil.rmtree(folder / "damaged", ignore_errors=True)
        shutil.rmtree(step, ignore_errors=True)
        done[damage.kind] += 1
        if not done.total() % 20:
            note(f"{done.total()} of {count}, {len(failures)} not as they must be")
    shutil.move(intact, step)
    return done, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.getLogger("gadjax").propagate = False
    began, folder = time.time(), Path(tempfile.mkdtemp(prefix="gadjax-flips-"))
    workdir, log = folder / "run", folder / "log"
    command = ("train", "--config", make_config(folder), "--workdir", workdir)
    if start(folder / "cache", log, *command, "--config.steps=6").wait():
        raise SystemExit(tail(log))
    newest = workdir / "checkpoints" / "6"
    files = [path for path in newest.rglob("*") if path.is_file()]
    figures = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    damages = draw(newest, args.count, args.seed)
    done, failures = damage_many(
        workdir / "checkpoints", args.count, args.seed, lambda line: print(line, flush=True)
    )
    figures |= {
        "damages": done.total(),
        **{f"{kind}s": done[kind] for kind in KINDS},
        "files_damaged": len({damage.name for damage in damages}),
        "found_named_and_fallen_back": done.total() - len(failures),
        "failures": "; ".join(failures),
    }
    if args.out:
        print(write_figures("flips", args.out, began, figures))
    print(figures)
    shutil.rmtree(folder)
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())
