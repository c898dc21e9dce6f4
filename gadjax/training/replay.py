"""Replay of one training step with instrumentation: `gadjax train --reproduce-step N`.

The newest valid checkpoint before the step is restored, the steps after it are replayed, and then
the step itself, update by update. Nothing is written into the workdir and its lock is not taken, so
that a stopped run can be replayed, or one that is still running.
"""

import json
import math
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gadjax import assets
from gadjax.checkpoints.restore import read_state
from gadjax.checkpoints.steps import committed_steps, latest_valid_step
from gadjax.data.prompts import read_prompts
from gadjax.errors import InputError, short_repr
from gadjax.io.storage import absolute
from gadjax.io.untrusted import read_json
from gadjax.parallel.sharding import put_on_mesh
from gadjax.runtime.distributed import check_devices, check_same_on_all, run_on_all_processes
from gadjax.runtime.settings import pinned_jax_config
from gadjax.training.compile import Steps, compile_steps
from gadjax.training.config import as_json, with_absolute_paths
from gadjax.training.instrument import FiniteCounter, instrument
from gadjax.training.loop import host_batches, restore_or_init
from gadjax.training.nonfinite import Update, merge_scalars, nonfinite_cause, sample_numbers
from gadjax.training.resume import check_inputs, check_resume
from gadjax.training.setup import Run, prepare
from gadjax.training.state import TrainState
from gadjax.types import Metrics

WORST_SAMPLES = 5  # listed for each term


def parse_step(text: str) -> int:
    """Step number from a command-line argument. Raises: InputError for anything else."""
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < 1:
        raise InputError(f"--reproduce-step: found {short_repr(text)}; expected a step, 1 or more")
    return int(text)


@pinned_jax_config()
def replay_step(config: ConfigDict, workdir: Path, step: int, devices: int | None = None) -> None:
    """Replay `step` of the workdir's run and print a report of it; called on every process.

    Args:
      config, workdir, devices: as for `gadjax.training.loop.train`.
      step: number of the step, 1 or more.

    Raises: InputError for a bad config, a workdir of another config or none, a step that the run
      has not done; RunStopped if a checkpoint cannot be read.
    """
    if devices is not None:
        check_devices(devices)
    check_same_on_all(as_json(config), workdir)
    config = with_absolute_paths(config)
    row = run_on_all_processes(lambda: _logged_row(config, workdir, step))
    run = run_on_all_processes(lambda: prepare(config))
    run_on_all_processes(lambda: check_inputs(workdir, config, run.inputs))
    steps = compile_steps(run)
    start, state = restore_or_init(
        run, steps, lambda shapes: _restore_before(workdir, step, shapes)
    )
    count = step - 1 - start
    where = f"checkpoint {start}" if start else "the start"
    _print(f"replaying {count} step{'s' * (count != 1)} from {where}")
    frozen = put_on_mesh(run.frozen, steps.frozen)
    batches = host_batches(run, steps, start, step)
    for _ in range(count):
        for update in steps.order:
            number, batch = next(batches)
            state, metrics = update(state, frozen, batch, number)
        jax.block_until_ready(metrics)  # otherwise batches of many steps queue on the devices
    updates = _replay_updates(run, steps, (state, frozen), batches)
    values = {name: float(x) for name, x in jax.device_get(merge_scalars(updates)).items()}
    _compare(step, values, row, config.log.every)


def _logged_row(config: ConfigDict, workdir: Path, step: int) -> dict[str, Any] | None:
    """Row of metrics.jsonl for a step; None if the step was not logged.

    Raises: InputError for a folder that is no workdir, a workdir of another config, or a step that
      the run has not done.
    """
    saved = workdir / "config.json"
    if not saved.is_file():
        state = "no config.json" if workdir.is_dir() else "no such folder"
        raise InputError(f"{workdir}: found {state}; expected a workdir of gadjax train")
    check_resume(read_json(saved), config, workdir)
    rows: dict[int, dict[str, Any]] = {}
    metrics, status = workdir / "metrics.jsonl", workdir / "status.json"
    if metrics.is_file():
        for line in metrics.read_bytes().decode("utf-8", "replace").splitlines():
            try:
                row = json.loads(line)
                rows[int(row["step"])] = row
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue  # a line cut short when the run was killed
    status_step = read_json(status).get("step") if status.is_file() else None
    done = max(
        [
            *rows,
            *committed_steps(workdir / "checkpoints"),
            status_step if isinstance(status_step, int) else 0,
        ]
    )
    if step > done:
        raise InputError(
            f"--reproduce-step: found {step}; expected 1 to {done}, the steps that {workdir} is "
            "known to have done"
        )
    return rows.get(step)


def _restore_before(
    workdir: Path, step: int, shapes: TrainState
) -> tuple[int, TrainState, dict] | None:
    folder = absolute(workdir / "checkpoints")
    latest, _ = latest_valid_step(folder, before=step)
    return None if latest is None else (latest, *read_state(folder / str(latest), shapes))


def _replay_updates(
    run: Run, steps: Steps, state_and_frozen: tuple[TrainState, Any], batches: Iterator
) -> list[Update]:
    """Replay a step's updates one by one, and report an instrumented pass of each first.

    Args:
      run: the prepared run.
      steps: its compiled updates.
      state_and_frozen: training state before the step, and the frozen networks.
      batches: of the step, as `host_batches` yields them.
    """
    counter = FiniteCounter()
    instrumented_steps = compile_steps(run, wrap=instrument(counter))
    (state, frozen), updates = state_and_frozen, []
    for instrumented, step in zip(instrumented_steps.order, steps.order, strict=True):
        number, batch = next(batches)
        first, prompt_numbers = int(number) * run.batch, batch.get("which")
        state, observations = instrumented(state, frozen, batch, number)
        counts = counter.pop()
        observations = jax.device_get(observations)
        state, metrics = step(state, frozen, batch, number)
        update = Update(first, prompt_numbers, metrics)
        _report(run, update, observations, counts)
        updates.append(update)
    return updates


def _report(
    run: Run, update: Update, observations: Metrics, counts: dict[str, tuple[int, int]]
) -> None:
    """Print an update's report: finiteness by network, the worst samples of each term, gradients.

    Args:
      run: the prepared run.
      update: the update.
      observations: metrics of the instrumented update.
      counts: name -> (recorded, not finite), as `FiniteCounter.pop` returns it.
    """
    metrics = jax.device_get(update.metrics)
    names = [name for name in observations if name.endswith("loss_B")]
    roles = [name.removesuffix("/bad") for name in metrics if name.endswith("/bad")]
    size = run.batch
    kind, numbers = sample_numbers(update, size)
    texts = _texts(run, update.first, numbers)
    _print(f"\nupdate {update.first // size}, of the {' and the '.join(roles)}")
    for role in roles:
        if metrics[f"{role}/bad"]:
            _print(f"  skipped, for {nonfinite_cause(update, role)}")
    _print(f"  {kind}: {', '.join(map(str, numbers))}")
    for name, (total, nonfinite) in sorted(counts.items()):
        _print(f"  {name}: {f'{nonfinite} of {total} NOT finite' if nonfinite else 'finite'}")
    for name in names:
        term = name.removesuffix("/loss_B")
        loss = metrics[f"{term}/loss" if term in roles else f"loss/{term}"]
        _print(f"  {'loss' if term in roles else 'term'} {term}: {loss!s}; the worst of {kind}")
        loss_B = observations[name]
        size_B = np.where(np.isfinite(loss_B), np.abs(loss_B), np.inf)
        for place in np.argsort(-size_B, kind="stable")[:WORST_SAMPLES]:
            _print(f"    {numbers[place]}: {loss_B[place]!s}  {texts[place]}")
    for role in roles:
        _print(f"  gradient of the {role}: {metrics[f'{role}/grad_norm']!s}")
        groups = {k: v for k, v in observations.items() if k.startswith(f"{role}/grad_norm/")}
        for name, norm in groups.items():
            _print(f"    {name.rpartition('/')[2]}: {norm!s}")


def _texts(run: Run, first: int, numbers: np.ndarray) -> list[str]:
    """Captions of an update's samples, one short line each."""
    data, source = run.config.data, run.source
    if data.prompts:
        captions = read_prompts(assets.resolve(data.prompts), data.column)
    elif data.images:
        captions = source.pictures.captions
    elif data.world:
        if data.cache:  # cached samples are the world's first ones, shuffled
            numbers = source.order(first, len(numbers))
        _, captions, _ = import_module(data.world).sample_batch(run.seed, numbers.tolist())
        return [short_repr(text) for text in captions]
    else:
        captions = source.embeddings.prompts
    return [short_repr(captions[number]) for number in numbers]


def _compare(step: int, values: dict[str, float], row: dict[str, Any] | None, every: int) -> None:
    """Print a step's metrics, and whether they equal its row of metrics.jsonl.

    Args:
      step: number of the step.
      values: replayed metrics.
      row: logged row; None if the step was not logged.
      every: `log.every` of the run.
    """
    _print(f"\nstep {step}")
    differing = []
    for name, value in values.items():
        logged = value if math.isfinite(value) else None  # as metrics.jsonl has it
        same = row is not None and name in row and row[name] == logged
        old = "" if row is None or same else f"  (it was {row.get(name, 'not there')})"
        _print(f"  {name}: {value!r}{old}")
        if not same:
            differing.append(name)
    if row is None:
        _print(f"metrics.jsonl has no row of step {step} (log.every is {every}) to compare with")
    elif differing:
        _print(
            f"step {step} differs from metrics.jsonl in {', '.join(differing)}: was it on another "
            "mesh, other devices or other packages (run.json)?"
        )
    else:
        _print(f"step {step} is as metrics.jsonl has it, to the last digit")


def _print(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
