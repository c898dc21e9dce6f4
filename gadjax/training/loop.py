"""Training loop on the host: data, updates, checkpoints, previews, progress."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from gadjax.checkpoints.checkpoint import Checkpoints
from gadjax.checkpoints.leaves import nested_dict
from gadjax.checkpoints.replicas import check_replicas
from gadjax.checkpoints.save_policy import SavePolicy
from gadjax.data.source import prefetch
from gadjax.errors import InputError, RunStopped, escape_nonprintable
from gadjax.io.storage import write_atomic
from gadjax.io.untrusted import read_json
from gadjax.models.adapters import adapter_rules
from gadjax.parallel.sharding import (
    batch_sharding,
    local_rows,
    put_on_mesh,
    shapes_with_shardings,
    shardings,
)
from gadjax.runtime.distributed import (
    PreemptionHandler,
    abort_on_lost_peer,
    check_devices,
    check_same_on_all,
    run_on_all_processes,
    write_heartbeat,
)
from gadjax.runtime.goodput import GoodputClock
from gadjax.runtime.profiler import Profile
from gadjax.runtime.progress import Progress, parameter_table
from gadjax.runtime.settings import pinned_jax_config
from gadjax.runtime.trackers import check_trackers
from gadjax.runtime.workdir_lock import LOCK, WorkdirLock
from gadjax.training.compile import Steps, compile_steps, compiling
from gadjax.training.config import as_json, with_absolute_paths, write_json
from gadjax.training.nonfinite import Update, check_nonfinite, merge_scalars
from gadjax.training.previews import Preview, with_extractor
from gadjax.training.resume import INPUTS, check_inputs, check_resume
from gadjax.training.run_record import write_record
from gadjax.training.setup import Run, prepare
from gadjax.training.state import TrainState

# Files in the workdir of a run that was killed before it had written its config.
LEFTOVERS = LOCK, "config.json.new"
Restore = Callable[[TrainState], tuple[int, TrainState, dict] | None]  # as `Checkpoints.restore`


class Profiling(NamedTuple):
    """Time measurement of one start of a run.

    Attributes:
      clock: where its time goes.
      profile: (step, count): steps to trace after that one; None for none.
    """

    clock: GoodputClock
    profile: tuple[int, int] | None


@pinned_jax_config()
def train(
    config: ConfigDict,
    workdir: Path,
    devices: int | None = None,
    profile: tuple[int, int] | None = None,
) -> None:
    """Train until `steps`, resuming from the workdir's checkpoints; called on every process.

    `status.json` has the state of the run (`gadjax.runtime.workdir_lock`).

    Args:
      config: training config.
      workdir: folder of checkpoints, logs and previews.
      devices: expected number of devices in all processes together.
      profile: (step, count): trace `count` steps after that step.

    Raises: InputError for a bad config, a workdir of another config or another run, processes that
      differ in config or workdir; RunStopped if updates stay non-finite or nothing can be saved.
    """
    profiling = Profiling(GoodputClock(), profile)
    if devices is not None:
        check_devices(devices)
    check_same_on_all(as_json(config), workdir)
    config = with_absolute_paths(config)
    run_on_all_processes(lambda: check_trackers(config.log.trackers))
    run_on_all_processes(lambda: _check_workdir(config, workdir))
    run = run_on_all_processes(lambda: with_extractor(prepare(config)))
    run_on_all_processes(lambda: check_inputs(workdir, config, run.inputs))
    steps = compile_steps(run)
    with run_on_all_processes(lambda: _lock_workdir(run, workdir)) as lock:
        checkpoints = Checkpoints(workdir / "checkpoints", keep=run.loop_spec.keep)
        try:
            with abort_on_lost_peer(), PreemptionHandler() as preemption:
                step = _loop(run, steps, checkpoints, lock, preemption, profiling)
        finally:
            checkpoints.close()
        lock.write_status("done" if step == run.loop_spec.steps else "preempted", step)


def _check_workdir(config: ConfigDict, workdir: Path) -> None:
    saved = workdir / "config.json"
    if saved.exists():
        check_resume(read_json(saved), config, workdir)
    elif workdir.exists() and any(path.name not in LEFTOVERS for path in workdir.iterdir()):
        raise InputError(f"{workdir}: found files but no config.json; expected an empty folder")


def _lock_workdir(run: Run, workdir: Path) -> WorkdirLock:
    lock = WorkdirLock(workdir, run.loop_spec.steps, is_owner=jax.process_index() == 0)
    if lock.is_owner:
        name = "config.json"
        try:
            write_json(run.config, workdir / name)
            name = INPUTS
            write_atomic(workdir / name, json.dumps(run.inputs, indent=2) + "\n")
        except OSError as error:
            text = error.strerror or error
            raise RunStopped(f"{workdir}/{name}: cannot be written: {text}") from error
    return lock


def _loop(
    run: Run,
    steps: Steps,
    checkpoints: Checkpoints,
    lock: WorkdirLock,
    preemption: PreemptionHandler,
    profiling: Profiling,
) -> int:
    """Run training steps until `steps` or preemption; returns the number of steps done."""
    loop_spec, workdir, clock = run.loop_spec, lock.workdir, profiling.clock
    done, state = restore_or_init(run, steps, checkpoints.restore)
    lock.write_status("running", done)
    frozen = put_on_mesh(run.frozen, steps.frozen)
    meta = {"config": as_json(run.config), "teacher": run.fingerprint}
    if run.bases.get("student") == "start":  # adapters on other weights than the teacher's
        meta["base"] = run.inputs["student.init"]
    previous: list[Update] = []
    with Progress(workdir, run.config, done, clock) as progress:
        saves = SavePolicy(checkpoints, loop_spec.failures, progress.note)
        log_start(run, done, state, progress.note)
        with compiling(run, steps, state, frozen) if done < loop_spec.steps else nullcontext():
            previews = loop_spec.preview_every
            preview = Preview(run, frozen, workdir, done, progress) if previews else None
            if preview and preview.is_due(done):  # a killed run may have saved it without a preview
                preview.show(state, done)
        batches = host_batches(run, steps, done, loop_spec.steps)
        profile = Profile(profiling.profile, workdir, progress.note)
        preempted = False
        while done < loop_spec.steps and not preempted:
            write_heartbeat(done)
            profile.before_step(done, state)
            step_updates: list[Update] = []
            for step in steps.order:
                with clock("data"):
                    update, batch = next(batches)
                state, metrics = step(state, frozen, batch, update)
                step_updates.append(Update(int(update) * run.batch, batch.get("which"), metrics))
            done += 1
            lock.step = done
            preempted = preemption.should_stop(done)
            progress.update(done, merge_scalars(step_updates))
            if progress.enabled and not previous:  # the first step of this start
                write_record(run, steps, workdir, state, frozen, batch, update)
            check_nonfinite(previous, done - 1, loop_spec.stop_after_bad, progress.note)
            previous = step_updates
            last = done == loop_spec.steps
            if done % loop_spec.checkpoint_every == 0 or last or preempted:
                progress.flush()
                with clock("checkpoint"):
                    check_replicas(state, done, checkpoints)
                    saves.save(done, state, meta, last=last or preempted)
                lock.write_status("running", done)
            if preview and preview.is_due(done):
                with clock("preview"):
                    preview.show(state, done)
        check_nonfinite(previous, done, loop_spec.stop_after_bad, progress.note)
        profile.close(done, state)
        with clock("checkpoint"):
            checkpoints.wait()
    return done


def log_start(run: Run, done: int, state: TrainState, note: Callable[[str], None]) -> None:
    """Log where a start begins, and the teacher and guidance of a distillation.

    Args:
      run: the prepared run.
      done: steps that are done.
      state: training state, for the table of parameters at step 0.
      note: called with each line.
    """
    note(
        f"resumed at step {done}" if done else parameter_table(nested_dict(state.params["student"]))
    )
    if run.step_spec.objective.needs.uses_teacher:
        note(f"teacher: {escape_nonprintable(run.teacher)}")
        note(guidance_note(run.step_spec.guidance, run.pipeline.folder_guidance))


def guidance_note(guidance: float, stored: float) -> str:
    """Log line of a distillation's guidance scale, and of the teacher folder's if it differs."""
    other = "" if guidance == stored else f" (its folder has {stored:g})"
    return f"the teacher is distilled at guidance {guidance:g}{other}"


def restore_or_init(run: Run, steps: Steps, restore: Restore) -> tuple[int, TrainState]:
    """Step and training state from `restore`, or step 0 and the initial state.

    Args:
      run: the prepared run.
      steps: its compiled updates, for the state's shardings.
      restore: shapes -> (step, state, metadata), or None if there is no checkpoint.

    Raises: InputError for a checkpoint of another teacher.
    """
    restored = restore(
        shapes_with_shardings(jax.eval_shape(run.start, run.initial_params), steps.state)
    )
    if restored is None:
        return 0, init_state(run, steps)
    step, state, meta = restored
    if meta["teacher"] != run.fingerprint:
        raise InputError(
            f"{run.teacher}: found weights of fingerprint {run.fingerprint}; expected "
            f"{meta['teacher']}, with which the run was begun"
        )
    return step, state


def init_state(run: Run, steps: Steps) -> TrainState:
    """Training state at step 0, sharded."""
    rules = run.pipeline.folder.components[run.pipeline.backbone].family.rules
    placements = shardings(run.initial_params, rules + adapter_rules(rules), run.mesh)
    initial_params = put_on_mesh(run.initial_params, placements)
    return jax.jit(run.start, out_shardings=steps.state)(initial_params)


def host_batches(
    run: Run, steps: Steps, done: int, stop: int
) -> Iterator[tuple[np.uint32, dict[str, jax.Array]]]:
    """Number and global batch of every update of steps done + 1 .. stop, prefetched to the mesh.

    Every process makes the samples of its own devices.

    Args:
      run: the prepared run.
      steps: its compiled updates.
      done: steps that are done.
      stop: last step.
    """
    updates_per_step = len(steps.order)  # data and keys are numbered by update, the critic's too
    size, sharding = run.batch, batch_sharding(run.mesh)
    low, high = local_rows(sharding, size)

    @pinned_jax_config()  # a thread's settings are its own
    def fetch(number: int):
        rows = run.source.batch(number * size + low, high - low)

        def place(x):
            def part(index):
                begin, end, _ = index[0].indices(size)
                return x[begin - low : end - low]

            return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

        return np.uint32(number), jax.tree.map(place, rows)

    return prefetch(fetch, done * updates_per_step, stop * updates_per_step)
