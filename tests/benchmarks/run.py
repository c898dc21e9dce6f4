"""Benchmarks of gadjax: print each figure beside its aim; slowness never fails.

    python tests/benchmarks/run.py cpu|gpu [--only NAME] [--json FILE] [--tiny]

cpu: about 30 minutes on two slow cores, 4 GB. gpu: PixArt-XL with random weights in bfloat16 on
one data-centre GPU of 80 GB; the first two took under eight minutes on an H200.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
# Before JAX starts: PyTorch shares the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from benchmarks import accuracy, attention, host, reference, step  # noqa: E402
from benchmarks.common import XL_512, XL_1024, Figure, Size  # noqa: E402

SMALL = Size(6, 6, 64, 64)  # 1024 tokens
TINY = Size(2, 2, 12, 8)


def in_order(*parts: Callable[[], Iterator[Figure]]) -> Callable[[], Iterator[Figure]]:
    return lambda: (figure for part in parts for figure in part())


def benchmarks(kind: str, tiny: bool) -> dict[str, Callable[[], Iterator[Figure]]]:
    """Benchmarks by name. tiny: the same programs at sizes whose figures are meaningless."""
    if kind == "gpu":
        head, size, large = ((16, 2, 12), TINY, TINY) if tiny else ((4096, 16, 72), XL_512, XL_1024)
        cases = "generator step", "whole iteration", "DP-DMD's student step"
        # The most informative first: the last two took longer than was left on an H200.
        return {
            "reference": partial(
                reference.reference,
                replace(size, batch=2 if tiny else 16),
                "bfloat16",
                "float16",
                True,
                3,
                cases[:1] if tiny else cases,
            ),
            "attention": in_order(
                partial(attention.exactness, ((size.tokens, *head[1:]),)),
                partial(attention.operator, head, 4, 5),
            ),
            "accuracy": partial(accuracy.accuracy, size, ("bfloat16",)),
            "gradients": partial(attention.programs, [], large, 3, jnp.bfloat16),
        }
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
        "host": partial(host.host, 4, 4, 1) if tiny else partial(host.host, 16, 40, 2),
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
    about = {
        "set": args.set,
        "tiny": args.tiny,
        "device": device(args.set, args.tiny),
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    path = args.json and args.json.absolute()
    figures = {}
    with contextlib.chdir(ROOT):  # where configs are
        for name in [args.only] if args.only else known:
            print(f"\n{name}: {about['device']}\n{'figure':58} {'value':>10} {'aim':>9} holds")
            figures[name] = []
            for figure in known[name]():
                figures[name].append(asdict(figure) | {"holds": figure.holds})
                print(row(figure), flush=True)
                if path:
                    path.write_text(json.dumps(about | {"figures": figures}, indent=1) + "\n")
    return 0


def row(figure: Figure) -> str:
    value = "-" if figure.value is None else f"{figure.value:.4g}"
    holds = {None: "", True: "yes", False: "NO"}[figure.holds]
    return f"{figure.name:58} {value:>10} {figure.aim:>9} {holds:5} {figure.note}".rstrip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
