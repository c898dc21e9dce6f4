"""Overhead of the host in a training step: waiting for data, and for checkpoints."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from benchmarks.common import Figure
from benchmarks.step import Bench

from gadjax.checkpoints.checkpoint import Checkpoints
from gadjax.training.config import as_json, read_config
from gadjax.training.loop import host_batches
from gadjax.training.setup import prepare


def host(batch: int, steps: int, saves: int) -> Iterator[Figure]:
    """Wall time for which `next(batches)` and `save` block the loop of configs/shapes_gad.py:dmd,
    the cheapest variant, over `steps` iterations. A checkpoint is written beside later iterations;
    its whole time is the cost where nothing overlaps."""
    overrides = [f"--config.batch={batch}", f"--config.steps={steps}"]
    bench = Bench(prepare(read_config(["--config=configs/shapes_gad.py:dmd", *overrides])))
    run, updates = bench.run, len(bench.steps.order)

    jax.block_until_ready(bench.iterate())
    alone = timed(lambda: bench.iterate(), steps)
    waiting = TimedIterator(batch for _, batch in host_batches(run, bench.steps, 0, steps))
    fed = timed(lambda: bench.iterate(waiting), steps)
    begin = time.perf_counter()
    for update in range(steps):
        run.source.batch(update * batch, batch)
    making = (time.perf_counter() - begin) / steps
    note = f"bundled teacher, batch {batch}, {updates} updates an iteration, {steps} iterations"
    yield Figure("seconds an iteration: one batch reused", alone, note=note)
    yield Figure("seconds an iteration: fed by the source", fed, note=note)
    yield Figure("ms to make a batch", 1e3 * making, note=note)
    yield Figure("waiting for data / iteration", waiting.seconds / steps / fed, note=note)

    stalls, writes = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=2)
        meta = {"config": as_json(run.config), "teacher": run.fingerprint}
        for step in range(1, saves + 1):
            jax.block_until_ready(bench.iterate())
            begin = time.perf_counter()
            checkpoints.save(step, bench.state, meta)
            stalls.append(time.perf_counter() - begin)
            checkpoints.wait()
            writes.append(time.perf_counter() - begin)
        checkpoints.close()
    every = run.loop_spec.checkpoint_every
    for name, times in (("save() blocks the loop", stalls), ("a checkpoint is written in", writes)):
        taken = sum(times) / saves
        yield Figure(f"seconds {name}", taken, note=f"mean of {saves}")
        note = f"one every {every} iterations"
        yield Figure(f"of training, {name}", taken / (taken + every * alone), note=note)


def timed(f, count: int) -> float:
    """Wall time in seconds of one of `count` calls."""
    begin = time.perf_counter()
    for _ in range(count):
        last = f()
    jax.block_until_ready(last)
    return (time.perf_counter() - begin) / count


class TimedIterator:
    """Iterator that adds up the time for which it blocked its consumer."""

    def __init__(self, iterator):
        self.iterator, self.seconds = iterator, 0.0

    def __next__(self):
        begin = time.perf_counter()
        try:
            return next(self.iterator)
        finally:
            self.seconds += time.perf_counter() - begin
