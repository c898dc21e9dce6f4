"""The profile's summary: seconds of kernels without those of the kernels in them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from benchmarks import profile_step
from benchmarks.profile_step import Kernel, Span, by_kind, dearest, lines_of, record, summary


def test_a_loop_is_without_its_body():
    one = [Span("while", 0, 100), Span("dot", 10, 40), Span("dot", 50, 80), Span("add", 100, 105)]
    other = [Span("dot", 20, 30)]  # at the same time on another device
    assert dearest([one, other]) == [
        Kernel("dot", 3, 70e-9),
        Kernel("while", 1, pytest.approx(40e-9)),
        Kernel("add", 1, pytest.approx(5e-9)),
    ]


def test_the_table_has_the_dearest_and_the_rest():
    kernels = [Kernel("x" * 99, 2, 0.6), Kernel("b", 1, 0.3), Kernel("c", 4, 0.1)]
    rows = [line.split() for line in summary(kernels, 3, top=1).splitlines()]
    assert rows[1] == ["x" * profile_step.MAX_NAME, "2", "600.000", "60.0%"]
    assert rows[2] == ["2", "others", "5", "400.000", "40.0%"]
    assert rows[3][:4] == ["3", "updates,", "1000.000", "ms"]
    assert "others" not in summary(kernels, 3) and "0 updates" in summary([], 0)


def test_kinds_are_sums_over_numbers():
    kernels = [Kernel("a/dot.1", 2, 0.5), Kernel("a/add", 1, 0.6), Kernel("a/dot.12", 1, 0.2)]
    assert by_kind(kernels) == [Kernel("a/dot", 3, 0.7), Kernel("a/add", 1, 0.6)]


def worker(folder: Path) -> None:
    """Print the kernels of a loop of one product, and the seconds that tracing it took."""
    x = jnp.ones((400, 400))

    @jax.jit
    def loop(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=20)[0]

    loop(x).block_until_ready()
    started = time.perf_counter()
    kernels = dearest(lines_of(record(lambda: loop(x), 2, folder)))
    print(json.dumps([kernels, time.perf_counter() - started]))


def run_alone(script: Path, *arguments: str) -> str:
    """Output of a script in a process of its own: the profiler crashes in some that have run much
    else."""
    paths = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parents[2])))
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_kernels_of_a_trace_are_the_programs(tmp_path):
    """The product dominates a program of one product, and no kernel is counted twice."""
    rows, elapsed = json.loads(run_alone(Path(__file__), str(tmp_path)))
    kernels = [Kernel(*row) for row in rows]
    assert kernels[0].name.startswith("jit_loop/") and kernels[0].calls in (40, 80)
    assert kernels[0].seconds > 0
    assert sum(kernel.seconds for kernel in kernels) < elapsed
    assert all(kernel.seconds > -1e-9 for kernel in kernels)


@pytest.mark.slow
def test_the_quickstarts_step_is_traced():
    arguments = "quickstart", "--updates=1", "--batch=2", "--top=3"
    assert run_alone(Path(profile_step.__file__), *arguments).count("%") == 8


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
