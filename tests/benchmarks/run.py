"""Benchmarks of gadjax: print each figure beside its aim; slowness never fails.

    python tests/benchmarks/run.py cpu|gpu [--only NAME] [--json FILE] [--tiny]

cpu: about 30 minutes on two slow cores, 4 GB. gpu: one data-centre GPU of 80 GB, the most telling
parts first: the attention kernels, PixArt-XL with random weights in bfloat16, training of the
bundled teacher. Each part is a process of its own: none ends another, and one that takes longer
than LIMIT_SECONDS is ended; what it has measured stays.

Exit code: 0; 1 if a part failed, or if the device is another.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = str(ROOT / "tests"), str(ROOT)  # the clone's gadjax, installed or not
# Before JAX starts: PyTorch shares the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from benchmarks import (  # noqa: E402
    accuracy,
    adapted,
    attention,
    costs,
    evaluation,
    growth,
    host,
    kernels,
    reference,
    step,
    training,
)
from benchmarks.common import XL_512, XL_1024, Figure, Size  # noqa: E402

from gadjax.io.storage import write_atomic  # noqa: E402
from gadjax.ops.pallas_gpu import TILES, Tile  # noqa: E402

LIMIT_SECONDS = {"cpu": 3600, "gpu": 300}  # of a part
STUDY = Path("runs/gpu_study")  # rows of the study: finished ones are not run again
FAILED = 3  # exit code of a part that has written why
SMALL = Size(6, 6, 64, 64)  # 1024 tokens
TINY = Size(2, 2, 12, 8)


def in_order(*parts: Callable[[], Iterator[Figure]]) -> Callable[[], Iterator[Figure]]:
    return lambda: (figure for part in parts for figure in part())


def benchmarks(kind: str, tiny: bool) -> dict[str, Callable[[], Iterator[Figure]]]:
    """Benchmarks by name. tiny: the same programs at sizes whose figures are meaningless."""
    if kind == "gpu":
        return gpu_benchmarks(tiny)
    base, sides, depths = (TINY, (8, 12), (1, 2)) if tiny else (SMALL, (32, 64, 128), (2, 4, 6))
    shapes = ((96, 2, 12),) if tiny else ((256, 6, 64), (1024, 6, 64))
    few, many = ("dmd_none",), tuple(step.VARIANTS)
    sizes = [TINY] if tiny else [XL_512, XL_1024]
    return {
        "accuracy": partial(accuracy.accuracy, base, ("bfloat16",) if tiny else accuracy.DTYPES),
        "attention": in_order(
            partial(attention.exactness, shapes),
            partial(attention.growth, base, sides, depths),
            partial(attention.programs, [], TINY if tiny else replace(SMALL, layers=2)),
        ),
        "ahead": partial(
            attention.ahead,
            ("v5e:1x1",) if tiny else ("v5e:1x1", "h100:1"),
            ((1024, 8, 72),) if tiny else ((1024, 16, 72), (4096, 16, 72)),
            4,
        ),
        "step": in_order(
            # Two samples, since neighbours share backward simulation.
            *(partial(step.evaluations, replace(size, batch=2)) for size in sizes),
            partial(step.iterations, few if tiny else many, 3),
        ),
        "costs": partial(costs.costs, *(("regression",),) * tiny),
        "adapters": partial(
            adapted.adapted, TINY if tiny else Size(4, 6, 64, 16, batch=4), 1 if tiny else 3
        ),
        "growth": partial(
            growth.growth,
            TINY if tiny else Size(4, 4, 48, 32),
            *((growth.TINY, 1) if tiny else (growth.AXES, 3)),
        ),
        "host": partial(host.host, 4, 4, 1) if tiny else partial(host.host, 16, 40, 2),
        "evaluation": partial(
            evaluation.evaluation, *((1, 2, 2, 2, 0) if tiny else (4, 64, 8, 64, 32))
        ),
        "reference": partial(
            reference.reference,
            TINY if tiny else Size(4, 4, 48, 32, batch=2),
            "float32",
            "float32",
            False,
            3,
            ("generator step",) if tiny else ("generator step", "DP-DMD's student step"),
        ),
    }


def gpu_benchmarks(tiny: bool) -> dict[str, Callable[[], Iterator[Figure]]]:
    """Benchmarks of a GPU, the most telling first."""
    head, size, large = ((16, 2, 12), TINY, TINY) if tiny else ((4096, 16, 72), XL_512, XL_1024)
    cases = "generator step", "whole iteration", "DP-DMD's student step"
    heads, dtypes = ((12,), ("float32",)) if tiny else ((64, 72, 128), ("bfloat16", "float32"))
    shapes = ((96, 2, 12),) if tiny else tuple((1024, 16, size) for size in (72, 64, 128))
    return {
        "kernels": partial(kernels.errors, 96 if tiny else 1024, heads, dtypes),
        "tiles": partial(
            kernels.tiles,
            shapes,
            dtypes[:1],
            1 if tiny else 5,
            # Tiny sizes are those of tests, in Pallas' interpreter.
            None if tiny else TILES,
            *([(Tile(64),)] if tiny else []),
        ),
        "attention": in_order(
            partial(attention.exactness, ((size.tokens, *head[1:]),)),
            partial(attention.operator, (size.tokens, *head[1:]), 4, 5),
            partial(attention.operator, head, 4, 5),
        ),
        "reference": partial(
            reference.reference,
            replace(size, batch=2 if tiny else 16),
            "bfloat16",
            "float16",
            True,
            3,
            cases[:1] if tiny else cases,
        ),
        "quickstart": partial(
            training.quickstart,
            *("--config.steps=3", "--config.batch=2", "--config.log.every=1") * tiny,
        ),
        "study": partial(
            training.study,
            training.STUDY_CELLS,
            12,
            *((0.0, STUDY / "tiny") if tiny else (150.0, STUDY)),
        ),
        # These took longer than was left on an H200.
        "accuracy": partial(accuracy.accuracy, size, ("bfloat16",)),
        "gradients": partial(attention.programs, [], large, 3, jnp.bfloat16),
    }


def device(kind: str, tiny: bool) -> str:
    """Name of the device. Raises: SystemExit where it is of another kind."""
    devices = jax.devices()
    if not tiny and devices[0].platform != kind:
        sys.exit(f"{kind}: found {devices[0].platform}; expected JAX to run on a {kind}")
    if not tiny and kind == "gpu" and len(devices) > 1:
        sys.exit(f"gpu: found {len(devices)} of them; expected one (CUDA_VISIBLE_DEVICES=0)")
    if devices[0].platform != "cpu":
        return devices[0].device_kind
    return f"{cpu()}, {len(os.sched_getaffinity(0))} cores"


def cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def versions() -> dict[str, str]:
    versions = {}
    for name in ("gadjax", "jax", "jaxlib", "flax", "torch", "diffusers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=("cpu", "gpu"))
    parser.add_argument("--only", help="one benchmark of the set")
    parser.add_argument("--json", type=Path, help="written after every figure")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any device: for tests")
    args = parser.parse_args(arguments)
    known = benchmarks(args.set, args.tiny)
    if args.only and args.only not in known:
        parser.error(f"--only: found {args.only!r}; expected one of {', '.join(known)}")
    path = args.json and args.json.absolute()
    if args.only:
        return run_part(args.only, known[args.only], args.set, args.tiny, path)
    if path:
        path.unlink(missing_ok=True)
    return run_in_processes(list(known), arguments, LIMIT_SECONDS[args.set], path)


def run_in_processes(
    names: list[str], arguments: list[str], limit_seconds: float, path: Path | None
) -> int:
    """Run each benchmark by a call of this script; a failure of one does not end the others.

    Args:
      names: of the benchmarks.
      arguments: of this call.
      limit_seconds: for each, after which it is ended.
      path: file of all figures; the processes add theirs.
    Returns: the exit code.
    """
    failures = {}
    for name in names:
        command = [sys.executable, __file__, *arguments, "--only", name]
        code = run_limited(command, limit_seconds)
        if code is None:
            code, failures[name] = FAILED, f"took longer than {limit_seconds:g} s"
        if code == 1:  # before any figure: another device, or a package is missing
            return 1
        if code not in (0, FAILED):
            failures[name] = f"ended with exit code {code}"
        elif code == FAILED:
            failures.setdefault(name, "failed")
        if name in failures and path and path.is_file():
            content = json.loads(path.read_text())
            content["failures"].setdefault(name, failures[name])
            write_results(path, content)
    for name, reason in failures.items():
        print(f"\n{name}: {reason}")
    return int(bool(failures))


def run_limited(command: list[str], limit_seconds: float) -> int | None:
    """Exit code of a command; None if it took too long and was ended, with what it had started."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return process.wait(limit_seconds)
        except BaseException as error:  # a Ctrl-C does not reach another session
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


def run_part(
    name: str, benchmark: Callable[[], Iterator[Figure]], kind: str, tiny: bool, path: Path | None
) -> int:
    """Run one benchmark: print its figures, and put each into the file as it comes.

    What a file of the same device and versions has of other benchmarks stays.

    Args:
      name: of the benchmark.
      benchmark: iterator of its figures.
      kind: cpu or gpu.
      tiny: whether the sizes are tiny.
      path: file; None for none.
    Returns: the exit code; FAILED where the benchmark raised an exception.
    """
    about = {
        "set": kind,
        "tiny": tiny,
        "device": device(kind, tiny),
        "versions": versions(),
    }
    content = about | {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "figures": {},
        "failures": {},
    }
    if path and path.is_file():
        earlier = json.loads(path.read_text())
        if about.items() <= earlier.items():
            content |= {key: earlier[key] for key in ("figures", "failures")}
    figures = content["figures"][name] = []
    content["failures"].pop(name, None)
    print(f"\n{name}: {about['device']}\n{'figure':58} {'value':>10} {'aim':>9} holds")
    try:
        with contextlib.chdir(ROOT):  # where configs are
            for figure in benchmark():
                figures.append(asdict(figure) | {"holds": figure.holds})
                print(row(figure), flush=True)
                write_results(path, content)
    except Exception as error:  # the next one may do better
        traceback.print_exc()
        content["failures"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        write_results(path, content)
        return FAILED
    return 0


def write_results(path: Path | None, content: dict) -> None:
    if path:
        write_atomic(path, json.dumps(content, indent=1) + "\n")


def row(figure: Figure) -> str:
    value = "-" if figure.value is None else f"{figure.value:.4g}"
    holds = {None: "", True: "yes", False: "NO"}[figure.holds]
    return f"{figure.name:58} {value:>10} {figure.aim:>9} {holds:5} {figure.note}".rstrip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
