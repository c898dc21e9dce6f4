"""Hostile inputs given to real commands, each in a process of its own."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hostile_folders import make_family, make_gadjax_folder
from mutate import Tree, mutate, read_tree, write_tree
from one_input import Outcome, emptied, photo

MEMORY = 12 << 30  # bytes of address space; JAX reserves some without using it
SECONDS = 10
CONFIG = """
from pathlib import Path

from gadjax.training.config import default_config

def get_config():
    config = default_config()
    here = Path(__file__).parent
    config.teacher = str(here.parent / "input")
    config.data.update(prompts=str(here / "prompts.txt"), length=8)
    config.objective = {"regression": {"steps": 1}}
    config.student.steps, config.student.timesteps = 2, (900, 400)
    config.steps, config.batch, config.remat, config.preview.every = 1, 8, "none", 0
    return config
"""


@dataclass(frozen=True)
class Command:
    """make: writes a valid input into an empty folder. arguments: of the command, where {input},
    {prompts}, {config}, {teacher} and {out} are paths."""

    name: str
    make: Callable[[Path], None]
    arguments: str


def make_run(folder: Path) -> None:
    from workdirs import make_workdir

    teacher = folder.parent / "fixed" / "teacher"
    emptied(folder).rmdir()
    make_workdir(folder, teacher)


pixart = partial(make_family, "pixart")
COMMANDS = [
    Command("convert", pixart, "convert {input} {out}"),
    Command("convert-back", make_gadjax_folder, "convert {input} {out}"),
    Command("sample", pixart, "sample --model {input} --prompts {prompts} --out {out} --steps 1"),
    Command("embed", pixart, "embed --model {input} --prompts {prompts} --out {out} --length 8"),
    Command("train", pixart, "train --config {config} --workdir {out}"),
    Command("plan", pixart, "plan --config {config} --topology gpu:8"),
    Command("export", make_run, "export --workdir {input} --out {out} --dtype bfloat16"),
    Command("sample-run", make_run, "sample --model {input} --prompts {prompts} --out {out}"),
    Command(
        "evaluate",
        pixart,
        "evaluate --teacher {teacher} --student {input} --prompts {prompts} --out {out} --seeds 2 "
        "--library 0 --teacher-steps 1",
    ),
]


def prepare(command: Command, scratch: Path) -> tuple[list[str], Tree]:
    """Everything but the input, which is returned; and the command's line."""
    fixed = scratch / "fixed"
    fixed.mkdir()
    make_family("pixart", fixed / "teacher")
    (fixed / "prompts.txt").write_text("red circle\ngreen square\n")
    (fixed / "config.py").write_text(CONFIG)
    command.make(emptied(scratch / "input"))
    places = {
        "input": scratch / "input",
        "out": scratch / "out",
        "prompts": fixed / "prompts.txt",
        "config": fixed / "config.py",
        "teacher": fixed / "teacher",
    }
    words = [word.format(**places) for word in command.arguments.split()]
    return [sys.executable, "-m", "gadjax", *words], read_tree(scratch / "input")


def run_once(line: list[str], tree: Tree, scratch: Path, cache: Path, limit: float) -> Outcome:
    """Run one command on one input. limit: seconds."""
    write_tree(tree, emptied(scratch / "input"))
    emptied(scratch / "here")
    before, start = photo(scratch), time.monotonic()
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            ["sh", "-c", f'ulimit -v {MEMORY >> 10}; exec "$@"', "sh", *line],
            cwd=scratch / "here",
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return Outcome("slow", f"after {limit:.0f} seconds", limit)
    seconds, stderr = time.monotonic() - start, done.stderr.decode(errors="replace")
    after = photo(scratch)
    left = sorted(set(after) - set(before))
    changed = [name for name in before if after.get(name) != before[name]]
    emptied(scratch / "out").rmdir()
    if changed:
        return Outcome("wrote", ", ".join(changed[:5]), seconds)
    if done.returncode == 0:
        return Outcome("ok", "", seconds)
    lines = stderr.splitlines()
    if done.returncode not in (2, 3) or "Traceback" in stderr:
        return Outcome("raised", f"exit code {done.returncode}: {stderr[-600:]!r}", seconds)
    # A run that stopped itself had work to report on before.
    is_one_line = len(lines) == 1 if done.returncode == 2 else bool(lines)
    if not is_one_line or not lines[-1].startswith("gadjax: ") or not lines[-1].isprintable():
        return Outcome("lines", f"{len(lines)}: {stderr[-600:]!r}", seconds)
    if done.returncode == 2 and left:
        return Outcome("wrote", ", ".join(left[:5]), seconds)
    return Outcome("refused", lines[-1], seconds)


def hostile_runs(command: Command, scratch: Path, cache: Path, seed: int, count: int):
    """Yields (number, input, outcome) of `count` runs, after one of the valid input."""
    line, valid = prepare(command, scratch)
    for limit in (600, 600):  # the first one compiles
        plain = run_once(line, valid, scratch, cache, limit)
    if plain.kind != "ok":
        raise RuntimeError(f"{command.name}: the valid input: {plain.kind}: {plain.text}")
    for number in range(count):
        tree = mutate(valid, random.Random(f"{seed} {command.name} {number}"))
        yield number, tree, run_once(line, tree, scratch, cache, 2 * plain.seconds + SECONDS)
