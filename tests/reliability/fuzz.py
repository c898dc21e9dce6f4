"""Hostile inputs, read as gadjax reads them: each must be read, or be refused in one line.

    python tests/reliability/fuzz.py --count 10000 [--target NAME] [--out docs/results/reliability]
    python tests/reliability/fuzz.py --commands 200

An input is a valid folder of which 1 to 3 files are changed (mutate.py). It is read in a process
with little memory to spare and little time. Anything but a result, InputError or RunStopped is a
finding, and so is a file that is written and a text of more than one line. Inputs that reach new
lines of gadjax are kept and changed further.

Targets are found in TARGETS of hostile_folders, hostile_inputs and hostile_networks.
"""

import argparse
import importlib
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from figures import write_figures
from mutate import Tree, mutate, read_tree, write_tree
from one_input import SECONDS, Lines, Outcome, Target, emptied, read_once

LISTS = ("hostile_folders", "hostile_inputs", "hostile_networks")
SPARE = 2 << 30  # bytes of address space beyond what a valid input took
CORPUS, DEEP = 200, 0.6


@dataclass
class Tally:
    """What became of a target's inputs. findings: text -> the first input's number."""

    kinds: Counter = field(default_factory=Counter)
    findings: dict[str, int] = field(default_factory=dict)
    slowest: float = 0.0
    lines: int = 0
    peak: int = 0

    def add(self, number: int, outcome: Outcome) -> None:
        self.kinds[outcome.kind] += 1
        self.slowest = max(self.slowest, outcome.seconds)
        if outcome.bad:
            self.findings.setdefault(f"{outcome.kind}: {outcome.text}", number)


def inputs(
    target: Target, scratch: Path, seed: int, numbers: range, tally: Tally
) -> Iterator[tuple[int, Tree, Outcome | None]]:
    """Read inputs: each is yielded before it is read (None), and with what became of it."""
    made = scratch / "valid"
    made.mkdir()
    target.make(made)
    corpus, first = [read_tree(made)], Lines()
    outcome = read_once(target, corpus[0], emptied(scratch / "one"), first, SECONDS)
    if outcome.kind != "ok":
        raise RuntimeError(f"{target.name}: the valid input: {outcome.kind}: {outcome.text}")
    executed = set(first.executed)
    with _little_memory():
        for number in numbers:
            rng = random.Random(f"{seed} {target.name} {number}")
            # Half of them from the valid input itself, or mutants would only grow worse.
            tree = mutate(corpus[0] if rng.random() < 0.5 else rng.choice(corpus), rng)
            yield number, tree, None
            lines = Lines()
            outcome = read_once(target, tree, emptied(scratch / "one"), lines, SECONDS)
            # Of what is refused at the door no change leads further.
            deep = len(lines.executed) > len(first.executed) * DEEP
            if lines.executed - executed and deep and not outcome.bad and len(corpus) < CORPUS:
                corpus.append(tree)
            executed |= lines.executed
            tally.lines = len(executed)
            tally.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            yield number, tree, outcome


@contextmanager
def _little_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _work(pipe, target: Target, seed: int, numbers: range, keep: Path) -> None:
    """The other process. Sends (number, None) before and (number, Outcome) after each input."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # who asks a question gets no answer
    os.dup2(os.open(keep / f"{target.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_fast()) as scratch:
        for number, tree, outcome in inputs(target, Path(scratch), seed, numbers, tally):
            if outcome is not None and outcome.bad:
                write_tree(tree, emptied(keep / f"{target.name}-{number}"))
            pipe.send((number, outcome, tally.lines, tally.peak))
    pipe.send(None)


def _fast() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def fuzz(target: Target, count: int, seed: int, keep: Path) -> Tally:
    """Read `count` inputs in another process, which is started again when it dies or hangs.

    keep: where the inputs of findings are left.
    """
    keep.mkdir(parents=True, exist_ok=True)
    context, tally, first = multiprocessing.get_context("spawn"), Tally(), 0
    while first < count:
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, target, seed, range(first, count), keep)
        process = context.Process(target=_work, args=arguments)
        process.start()
        theirs.close()
        number, patience = None, 300
        try:
            while ours.poll(patience) and (message := ours.recv()) is not None:
                number, outcome, lines, peak = message
                tally.lines, tally.peak = max(tally.lines, lines), max(tally.peak, peak)
                patience = 6 * SECONDS if outcome is None else 300
                if outcome is not None:
                    tally.add(number, outcome)
                    first, number = number + 1, None
            dead = number is not None
        except EOFError:
            dead = True
        process.kill()
        process.join()
        if dead and number is None:
            raise RuntimeError(f"{target.name}: ended between inputs; see {keep}/{target.name}.log")
        if dead:
            tally.add(number, Outcome("died", f"exit code {process.exitcode}"))
            first = number + 1
    return tally


def targets() -> list[Target]:
    found = []
    for name in LISTS:
        if (Path(__file__).parent / f"{name}.py").is_file():
            found += importlib.import_module(name).TARGETS
    return found


def figures_of(tallies: dict[str, Tally]) -> dict:
    """Of all together, and of each by its name."""
    figures: dict = {"inputs": 0, "ok": 0, "refused": 0, "findings": 0}
    for name, tally in tallies.items():
        found = {"inputs": sum(tally.kinds.values())}
        found |= {"ok": tally.kinds["ok"], "refused": tally.kinds["refused"]}
        found["findings"] = found["inputs"] - found["ok"] - found["refused"]
        for key, value in found.items():
            figures[key] += value
            figures[f"{name}/{key}"] = value
        figures[f"{name}/lines"] = tally.lines
    figures["slowest_seconds"] = round(max(t.slowest for t in tallies.values()), 2)
    figures["peak_rss_mib"] = max(t.peak for t in tallies.values()) >> 20
    return figures


def print_tally(name: str, tally: Tally) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.kinds.items()))
    lines = f", {tally.lines} lines of gadjax" if tally.lines else ""
    print(f"{name}: {kinds}; slowest {tally.slowest:.1f} s{lines}", flush=True)
    for text, number in tally.findings.items():
        print(f"  {name}-{number}: {text}", flush=True)


def share(count: int, parts: int) -> list[int]:
    return [count // parts + (i < count % parts) for i in range(parts)]


def fuzz_all(chosen: list[Target], count: int, seed: int, keep: Path) -> dict:
    tallies = {}
    for target, part in zip(chosen, share(count, len(chosen)), strict=True):
        tallies[target.name] = fuzz(target, part, seed, keep)
        print_tally(target.name, tallies[target.name])
    return figures_of(tallies)


def fuzz_commands(chosen: list, count: int, seed: int, keep: Path) -> dict:
    from hostile_commands import hostile_runs

    keep.mkdir(parents=True, exist_ok=True)
    tallies = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        cache = emptied(Path(scratch, "cache"))
        for command, part in zip(chosen, share(count, len(chosen)), strict=True):
            tally = tallies[command.name] = Tally()
            place = emptied(Path(scratch, command.name))
            for number, tree, outcome in hostile_runs(command, place, cache, seed, part):
                tally.add(number, outcome)
                if outcome.bad:
                    write_tree(tree, emptied(keep / f"command-{command.name}-{number}"))
            tally.peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
            print_tally(command.name, tally)
    return figures_of(tallies)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=0, help="inputs, over all targets")
    parser.add_argument("--commands", type=int, default=0, help="inputs of real commands")
    parser.add_argument("--target", action="append", help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "findings")
    parser.add_argument("--out", type=Path, help="folder for the figures")
    parser.add_argument("--name", default="fuzz", help="of their file, with --count")
    args = parser.parse_args()
    lists = []
    if args.count:
        lists.append((args.name, fuzz_all, targets(), args.count))
    if args.commands:
        from hostile_commands import COMMANDS

        lists.append(("fuzz_commands", fuzz_commands, COMMANDS, args.commands))
    findings = 0
    for name, function, found, count in lists:
        chosen = [item for item in found if args.target is None or item.name in args.target]
        start, figures = time.time(), function(chosen, count, args.seed, args.keep)
        findings += figures["findings"]
        if args.out:
            write_figures(name, args.out, start, figures)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
