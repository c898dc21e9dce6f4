"""One step of a run done again and looked at: `gadjax train --reproduce-step N`.

The newest sound checkpoint before the step is read, the steps after it are done again, and then the
step itself, update by update. Nothing is written into the workdir and its lock is not taken, so
that it can be done beside a stopped run, or beside one that goes on.
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
from gadjax.checkpoints.checkpoint import read_state
from gadjax.checkpoints.steps import committed_steps, latest_valid_step
from gadjax.data.prompts import read_prompts
from gadjax.errors import InputError, short_repr
from gadjax.io.storage import absolute
from gadjax.io.untrusted import read_json
from gadjax.parallel.sharding import put_on_mesh
from gadjax.runtime.distributed import check_devices, check_same_on_all, run_on_all_processes
from gadjax.runtime.settings import pinned_jax_config
from gadjax.training.compile import Steps, compile_steps
from gadjax.training.config import as_json, check_inputs, check_resume, with_resolved_teacher
from gadjax.training.instrument import FiniteCounter, instrument
from gadjax.training.loop import begin, host_batches
from gadjax.training.nonfinite import Update, merge_scalars, nonfinite_cause, sample_numbers
from gadjax.training.setup import Run, prepare
from gadjax.training.state import TrainState
from gadjax.types import Metrics

WORST = 5  # samples that are named of each term


def parse_step(text: str) -> int:
    """Raises: InputError for what is no number of a step."""
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < 1:
        raise InputError(f"--reproduce-step: found {short_repr(text)}; expected a step, 1 or more")
    return int(text)


@pinned_jax_config()
def replay_step(config: ConfigDict, workdir: Path, step: int, devices: int | None = None) -> None:
    """Do `step` of the workdir's run again and print what there is to see of it; every process of
    the run calls it. config, devices: as `gadjax.training.loop.train` takes them.

    Raises: InputError for a bad config, a workdir of another config or none, a step that the run
    has not done; RunStopped where a checkpoint cannot be read.
    """
    if devices is not None:
        check_devices(devices)
    check_same_on_all(as_json(config), workdir)
    config = with_resolved_teacher(config)
    row = run_on_all_processes(lambda: _row_of(config, workdir, step))
    run = run_on_all_processes(lambda: prepare(config))
    run_on_all_processes(lambda: check_inputs(workdir, config, run.inputs))
    steps = compile_steps(run)
    start, state = begin(run, steps, lambda shapes: _newest(workdir, step, shapes))
    again = step - 1 - start
    where = f"checkpoint {start}" if start else "the start"
    _say(f"replaying {again} step{'s' * (again != 1)} from {where}")
    frozen = put_on_mesh(run.frozen, steps.frozen)
    batches = host_batches(run, steps, start, step)
    for _ in range(again):
        for update in steps.order:
            number, batch = next(batches)
            state, metrics = update(state, frozen, batch, number)
        jax.block_until_ready(metrics)  # or batches of many steps would wait on the devices
    begun = _look(run, steps, (state, frozen), batches)
    values = {name: float(x) for name, x in jax.device_get(merge_scalars(begun)).items()}
    _compare(step, values, row, config.log.every)


def _row_of(config: ConfigDict, workdir: Path, step: int) -> dict[str, Any] | None:
    """What metrics.jsonl says of a step; None where it does not."""
    saved = workdir / "config.json"
    if not saved.is_file():
        found = "no config.json" if workdir.is_dir() else "no such folder"
        raise InputError(f"{workdir}: found {found}; expected a workdir of gadjax train")
    check_resume(read_json(saved), config, workdir)
    rows: dict[int, dict[str, Any]] = {}
    metrics, status = workdir / "metrics.jsonl", workdir / "status.json"
    if metrics.is_file():
        for line in metrics.read_bytes().decode("utf-8", "replace").splitlines():
            try:
                found = json.loads(line)
                rows[int(found["step"])] = found
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue  # what a kill left of a line
    said = read_json(status).get("step") if status.is_file() else None
    done = max(
        [*rows, *committed_steps(workdir / "checkpoints"), said if isinstance(said, int) else 0]
    )
    if step > done:
        raise InputError(
            f"--reproduce-step: found {step}; expected 1 to {done}, the steps that {workdir} is "
            "known to have done"
        )
    return rows.get(step)


def _newest(workdir: Path, step: int, shapes: TrainState) -> tuple[int, TrainState, dict] | None:
    folder = absolute(workdir / "checkpoints")
    found, _ = latest_valid_step(folder, before=step)
    return None if found is None else (found, *read_state(folder / str(found), shapes))


def _look(run: Run, steps: Steps, held: tuple[TrainState, Any], batches: Iterator) -> list[Update]:
    """The step's updates done one by one, each after a look at it. held: state, frozen networks."""
    seen = FiniteCounter()
    looks = compile_steps(run, wrap=instrument(seen))
    (state, frozen), begun = held, []
    for look, step in zip(looks.order, steps.order, strict=True):
        number, batch = next(batches)
        first, which = int(number) * run.config.batch, batch.get("which")
        state, found = look(state, frozen, batch, number)
        counts = seen.pop()
        found = jax.device_get(found)
        state, metrics = step(state, frozen, batch, number)
        update = Update(first, which, metrics)
        _report(run, update, found, counts)
        begun.append(update)
    return begun


def _report(run: Run, update: Update, looked: Metrics, counts: dict[str, tuple[int, int]]) -> None:
    """looked: the update's metrics with what a look adds. counts: as `Seen.take`."""
    metrics = jax.device_get(update.metrics)
    names = [name for name in looked if name.endswith("loss_B")]
    roles = [name.removesuffix("/bad") for name in metrics if name.endswith("/bad")]
    size = run.config.batch
    kind, numbers = sample_numbers(update, size)
    texts = _texts(run, update.first, numbers)
    _say(f"\nupdate {update.first // size}, of the {' and the '.join(roles)}")
    for role in roles:
        if metrics[f"{role}/bad"]:
            _say(f"  left out, for {nonfinite_cause(update, role)}")
    _say(f"  {kind}: {', '.join(map(str, numbers))}")
    for name, (all_of, bad) in sorted(counts.items()):
        _say(f"  {name}: {f'{bad} of {all_of} NOT finite' if bad else 'finite'}")
    for name in names:
        term = name.removesuffix("/loss_B")
        loss = metrics[f"{term}/loss" if term in roles else f"loss/{term}"]
        _say(f"  {'loss' if term in roles else 'term'} {term}: {loss!s}; the worst of {kind}")
        loss_B = looked[name]
        size_B = np.where(np.isfinite(loss_B), np.abs(loss_B), np.inf)
        for place in np.argsort(-size_B, kind="stable")[:WORST]:
            _say(f"    {numbers[place]}: {loss_B[place]!s}  {texts[place]}")
    for role in roles:
        _say(f"  gradient of the {role}: {metrics[f'{role}/grad_norm']!s}")
        groups = {k: v for k, v in looked.items() if k.startswith(f"{role}/grad_norm/")}
        for name, norm in groups.items():
            _say(f"    {name.rpartition('/')[2]}: {norm!s}")


def _texts(run: Run, first: int, numbers: np.ndarray) -> list[str]:
    """The captions of an update's samples, each in one short line."""
    data, source = run.config.data, run.source
    if data.prompts:
        captions = read_prompts(assets.resolve(data.prompts), data.column)
    elif data.images:
        captions = source.pictures.captions
    elif data.world:
        if data.cache:  # its samples are the world's first ones in another order
            numbers = source.order(first, len(numbers))
        _, captions, _ = import_module(data.world).sample_batch(run.config.seed, numbers.tolist())
        return [short_repr(text) for text in captions]
    else:
        captions = source.embeddings.prompts
    return [short_repr(captions[number]) for number in numbers]


def _compare(step: int, values: dict[str, float], row: dict[str, Any] | None, every: int) -> None:
    """Print a step's metrics, and whether they are what metrics.jsonl has of it."""
    _say(f"\nstep {step}")
    differing = []
    for name, value in values.items():
        now = value if math.isfinite(value) else None  # as it is written there
        same = row is not None and name in row and row[name] == now
        before = "" if row is None or same else f"  (it was {row.get(name, 'not there')})"
        _say(f"  {name}: {value!r}{before}")
        if not same:
            differing.append(name)
    if row is None:
        _say(f"metrics.jsonl has no row of step {step} (log.every is {every}) to compare with")
    elif differing:
        _say(
            f"step {step} differs from metrics.jsonl in {', '.join(differing)}: was it on another "
            "mesh, other devices or other packages (run.json)?"
        )
    else:
        _say(f"step {step} is as metrics.jsonl has it, to the last digit")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
