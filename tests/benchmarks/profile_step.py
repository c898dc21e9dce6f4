"""Profile of a training step: XLA's trace, summarised to the dearest kernels in text.

    python tests/benchmarks/profile_step.py quickstart|xl [--updates 3] [--trace DIR] [--top 10]

quickstart: a step of launch/quickstart.sh (two critic updates, one of the student). xl: a whole
iteration of PixArt-XL at 512 pixels, as `run.py gpu` times it, in bfloat16. Runs on any device. The
trace stays in DIR, for TensorBoard, xprof or Perfetto.
"""

import argparse
import contextlib
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = str(ROOT / "tests"), str(ROOT)  # the clone's gadjax, installed or not

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from benchmarks import reference  # noqa: E402
from benchmarks.common import XL_512, Size  # noqa: E402
from benchmarks.step import GRID, Bench  # noqa: E402
from jax.profiler import ProfileData  # noqa: E402

from gadjax.objectives import GAD, TDM  # noqa: E402
from gadjax.training.config import read_config  # noqa: E402
from gadjax.training.setup import prepare  # noqa: E402

MAX_NAME = 70  # characters of a kernel's name


class Kernel(NamedTuple):
    """Kernel of a trace: its calls, and the seconds in it but not in kernels that it calls."""

    name: str
    calls: int
    seconds: float


class Span(NamedTuple):
    """Event of a trace in nanoseconds."""

    name: str
    start: float
    end: float


def whole_iteration(size: Size, dtype=jnp.bfloat16) -> Callable[[], object]:
    """Student's and critic's update of a PixArt of this size with random weights."""
    objective = TDM() + GAD(steps=1)
    return reference.make_update(size, objective, GRID, True, jnp.dtype(dtype), True)[0]


def quickstart(*overrides: str) -> Callable[[], object]:
    """Step of the quickstart's config, from the bundled teacher."""
    config = read_config(["--config=configs/shapes_gad.py:quickstart", *overrides])
    return Bench(prepare(config)).iterate


def record(update: Callable[[], object], count: int, folder: Path) -> ProfileData:
    """Trace `count` updates, after one that is not traced."""
    jax.block_until_ready(update())
    with jax.profiler.trace(folder):
        for _ in range(count):
            result = update()
        jax.block_until_ready(result)
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
    return ProfileData.from_file(str(newest))


def lines_of(data: ProfileData) -> Iterator[list[Span]]:
    """Spans of kernels by line: a GPU's streams, a TPU's operations, a CPU's threads."""
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or planes:
        lines = list(plane.lines)
        # Beside a TPU's operations there are lines of the programs and steps that contain them.
        operations = [line for line in lines if line.name == "XLA Ops"]
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in operations or streams or lines:
            on_device = line.name.startswith(("XLA Ops", "Stream"))
            yield [
                Span(_name(event.name, stats), event.start_ns, event.end_ns)
                for event, stats in ((event, dict(event.stats)) for event in line.events)
                # A CPU's threads have events of other kinds too.
                if on_device or "hlo_op" in stats
            ]


def _name(text: str, stats: dict) -> str:
    """PROGRAM/OPERATION of an event; a TPU's has the operation's whole HLO."""
    operation = text.partition(" = ")[0].lstrip("%")
    return f"{stats['hlo_module']}/{operation}" if "hlo_module" in stats else operation


def by_kind(kernels: list[Kernel]) -> list[Kernel]:
    """Sums of kernels whose names differ in their numbers alone."""
    sums: dict[str, Kernel] = {}
    for kernel in kernels:
        kind = re.sub(r"[.\d]+$", "", kernel.name)
        _, calls, own = sums.get(kind, Kernel(kind, 0, 0.0))
        sums[kind] = Kernel(kind, calls + kernel.calls, own + kernel.seconds)
    return sorted(sums.values(), key=lambda kernel: -kernel.seconds)


def dearest(lines: Iterable[list[Span]]) -> list[Kernel]:
    """Kernels by their own seconds, the dearest first: a loop's are without those of its body."""
    calls, own = defaultdict(int), defaultdict(float)
    for spans in lines:
        open_spans: list[Span] = []
        for span in sorted(spans, key=lambda span: (span.start, -span.end)):
            while open_spans and open_spans[-1].end <= span.start:
                open_spans.pop()
            if open_spans:
                own[open_spans[-1].name] -= span.end - span.start
            calls[span.name] += 1
            own[span.name] += span.end - span.start
            open_spans.append(span)
    kernels = [Kernel(name, calls[name], own[name] / 1e9) for name in own]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def summary(kernels: list[Kernel], updates: int, top: int = 10) -> str:
    """Table of the dearest kernels: calls, total milliseconds and share of all kernels' time."""
    total = sum(kernel.seconds for kernel in kernels)
    rest = Kernel(
        f"{len(kernels[top:])} others",
        sum(kernel.calls for kernel in kernels[top:]),
        sum(kernel.seconds for kernel in kernels[top:]),
    )
    rows = [f"{'kernel':{MAX_NAME}} {'calls':>8} {'ms':>10} {'share':>7}"]
    for kernel in [*kernels[:top], *[rest] * (len(kernels) > top)]:
        name, share = kernel.name[:MAX_NAME], kernel.seconds / total if total else 0.0
        rows.append(f"{name:{MAX_NAME}} {kernel.calls:8} {1e3 * kernel.seconds:10.3f} {share:7.1%}")
    rows.append(f"{updates} updates, {1e3 * total:.3f} ms in kernels, all devices together")
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("quickstart", "xl"))
    parser.add_argument("--updates", type=int, default=3, help="in the trace")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--top", type=int, default=10, help="kernels in the table")
    parser.add_argument("--trace", type=Path, help="folder to keep the trace in")
    args = parser.parse_args(arguments)
    with contextlib.chdir(ROOT), tempfile.TemporaryDirectory() as folder:  # where configs are
        if args.what == "xl":
            update = whole_iteration(replace(XL_512, batch=args.batch))
        else:
            update = quickstart(f"--config.batch={args.batch}")
        data = record(update, args.updates, args.trace or Path(folder))
        print(f"{args.what}, batch {args.batch}, {jax.devices()[0].device_kind}")
        kernels = dearest(lines_of(data))
        print(summary(kernels, args.updates, args.top), "\nby kind")
        print(summary(by_kind(kernels), args.updates, args.top))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
