"""Comparison of objectives on closed-form teachers: docs/results/bench.md.

    python -m gadjax.analytic [--only PATTERN ...] [--list] [--updates 1000] [--seeds 3]
                              [--out docs/results/bench]

A row is SETTING/LABEL, such as flow_1/dmd_0.3_gad; --only takes patterns of them (flow_1/*). A row
with a file in --out is finished; the page beside --out is written anew after each.
"""

import argparse
import fnmatch
import json
import sys
import time
from pathlib import Path

from gadjax.analytic.report import finished, recipe, row_path, run_row, write_page
from gadjax.analytic.rows import all_rows
from gadjax.errors import InputError
from gadjax.io.storage import write_atomic


def selected(patterns: list[str]) -> list[str]:
    """Names of the rows that match one of the patterns, in order; all without a pattern.

    Raises: InputError for a pattern that no row matches.
    """
    names = list(all_rows())
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"--only: found {pattern!r}; expected a row of --list, or a pattern")
    return [n for n in names if not patterns or any(fnmatch.fnmatch(n, p) for p in patterns)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="rows, or patterns of them")
    parser.add_argument("--list", action="store_true", help="name the rows, and end")
    parser.add_argument("--updates", type=int, default=1000, help="student updates of a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a row")
    parser.add_argument("--out", type=Path, default=Path("docs/results/bench"))
    args = parser.parse_args(argv)
    for option in ("updates", "seeds"):
        if getattr(args, option) < 1:
            raise InputError(f"--{option}: found {getattr(args, option)}; expected 1 or more")
    names = selected(args.only)
    done = {n for n in names if finished(args.out, n, recipe(n, args.updates, args.seeds))}
    if args.list:
        print(*(f"{name}{' (finished)' * (name in done)}" for name in names), sep="\n")
        return 0
    left = [name for name in names if name not in done]
    begun, failed = time.perf_counter(), 0
    for number, name in enumerate(left, 1):
        problem = work(name, args.updates, args.seeds, args.out)
        failed += bool(problem)
        seconds = time.perf_counter() - begun
        print(f"{number}/{len(left)} {name}: {problem or 'done'}, {seconds:.0f} s", flush=True)
    print(write_page(args.out, args.updates, args.seeds))
    return 1 if failed else 0


def work(name: str, updates: int, seeds: int, out: Path) -> str:
    """Train a row and write its file and the page; returns why there is none, or ''.

    Args:
      name: SETTING/LABEL.
      updates, seeds: of the row.
      out: folder of the rows.
    """
    try:
        record = run_row(name, updates, seeds)
    except Exception as error:  # one row's failure must not end the others
        return f"{type(error).__name__}: {error}"
    path = row_path(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(record, indent=1) + "\n")
    write_page(out, updates, seeds)
    return ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
