"""The host's side of training: data in, updates, checkpoints, and something to look at."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from gadjax.checkpoints.checkpoint import Checkpoints
from gadjax.checkpoints.replicas import check_replicas
from gadjax.checkpoints.save_policy import Saves
from gadjax.data.source import prefetch
from gadjax.errors import InputError, RunStopped, printable
from gadjax.formats.sampling_config import read_sampling
from gadjax.io.storage import write_whole
from gadjax.io.untrusted import read_json
from gadjax.parallel.sharding import batch_sharding, put, rows_here, shapes_at
from gadjax.runtime.distributed import Leaving, agree, beat, check_devices, losing_peers, together
from gadjax.runtime.goodput import Clock
from gadjax.runtime.profiler import Profile
from gadjax.runtime.progress import Progress, overview
from gadjax.runtime.settings import settled
from gadjax.runtime.trackers import check_trackers
from gadjax.runtime.workdir_lock import LOCK, Claim
from gadjax.training.compile import Steps, compile_steps
from gadjax.training.config import (
    INPUTS,
    as_json,
    check_inputs,
    check_resume,
    with_teacher_found,
    write_json,
)
from gadjax.training.nonfinite import Update, check_masked, scalars_of
from gadjax.training.previews import Preview
from gadjax.training.run_record import write_record
from gadjax.training.setup import Run, prepare
from gadjax.training.state import TrainState

# What a run may leave in its workdir that is killed before it has written its config.
BEGUN = LOCK, "config.json.new"
Restore = Callable[[TrainState], tuple[int, TrainState, dict] | None]  # as `Checkpoints.restore`


class Watch(NamedTuple):
    """How a start is looked at: where its time goes, and (step, count) of what is profiled."""

    clock: Clock
    profile: tuple[int, int] | None


@settled()
def train(
    config: ConfigDict,
    workdir: Path,
    devices: int | None = None,
    profile: tuple[int, int] | None = None,
) -> None:
    """Train until `steps`, resuming what the workdir holds; every process of the run calls it.

    devices: how many there have to be in all processes together. profile: (step, count) to trace
    so many steps after that one. `status.json` says how it stands (`gadjax.runtime.workdir_lock`).
    Raises: InputError for a bad config, a workdir of another config or another run, processes that
    run different things; RunStopped where updates stay non-finite or nothing can be saved.
    """
    watch = Watch(Clock(), profile)
    if devices is not None:
        check_devices(devices)
    agree(as_json(config), workdir)
    config = with_teacher_found(config)
    together(lambda: check_trackers(config.log.trackers))
    together(lambda: _check_workdir(config, workdir))
    run = together(lambda: prepare(config))
    together(lambda: check_inputs(workdir, config, run.inputs))
    steps = compile_steps(run)
    with together(lambda: _claim(config, workdir, run.inputs)) as claim:
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
        try:
            with losing_peers(), Leaving() as leaving:
                step = _loop(run, steps, checkpoints, claim, leaving, watch)
        finally:
            checkpoints.close()
        claim.say("done" if step == config.steps else "preempted", step)


def _check_workdir(config: ConfigDict, workdir: Path) -> None:
    saved = workdir / "config.json"
    if saved.exists():
        check_resume(read_json(saved), config, workdir)
    elif workdir.exists() and any(path.name not in BEGUN for path in workdir.iterdir()):
        raise InputError(f"{workdir}: found files but no config.json; expected an empty folder")


def _claim(config: ConfigDict, workdir: Path, inputs: dict[str, str]) -> Claim:
    claim = Claim(workdir, config.steps, mine=jax.process_index() == 0)
    if claim.mine:
        name = "config.json"
        try:
            write_json(config, workdir / name)
            name = INPUTS
            write_whole(workdir / name, json.dumps(inputs, indent=2) + "\n")
        except OSError as error:
            text = error.strerror or error
            raise RunStopped(f"{workdir}/{name}: cannot be written: {text}") from error
    return claim


def _loop(
    run: Run,
    steps: Steps,
    checkpoints: Checkpoints,
    claim: Claim,
    leaving: Leaving,
    watch: Watch,
) -> int:
    """Returns the number of steps done."""
    config, workdir, clock = run.config, claim.workdir, watch.clock
    done, state = begin(run, steps, checkpoints.restore)
    resumed = done > 0
    claim.say("running", done)
    frozen = put(run.frozen, steps.frozen)
    meta = {"config": as_json(config), "teacher": run.fingerprint}
    show = Preview(run, frozen, workdir) if config.preview.every else None
    before: list[Update] = []
    with Progress(workdir, config, done, clock) as progress:
        saves = Saves(checkpoints, config.checkpoint.failures, progress.note)
        progress.note(f"resumed at step {done}" if resumed else overview(state.params["student"]))
        if run.recipe.objective.needs.distils:
            own = read_sampling(run.pipeline.folder.path, run.pipeline.sampling).guidance
            own = run.pipeline.denoiser.scale_of(own)
            progress.note(f"teacher: {printable(config.teacher)}")
            progress.note(guidance_note(run.recipe.guidance, own))
        if show and show.due(done):  # a run that was killed had saved this step, not yet shown it
            progress.image(done, "preview", show(state, done))
        batches = host_batches(run, steps, done, config.steps)
        profile = Profile(watch.profile, workdir, progress.note)
        leave = False
        while done < config.steps and not leave:
            beat(done)
            profile.at(done, state)
            begun: list[Update] = []
            for step in steps.order:
                with clock("data"):
                    update, batch = next(batches)
                state, metrics = step(state, frozen, batch, update)
                begun.append(Update(int(update) * config.batch, batch.get("which"), metrics))
            done += 1
            claim.step = done
            leave = leaving.asked(done)
            progress.update(done, scalars_of(begun))
            if progress.enabled and not before:  # the first step of this start
                write_record(run, steps, workdir, state, frozen, batch, update)
            check_masked(before, done - 1, config.stop_after_bad, progress.note)
            before = begun
            last = done == config.steps
            if done % config.checkpoint.every == 0 or last or leave:
                progress.flush()
                with clock("checkpoint"):
                    check_replicas(state, done, checkpoints)
                    saves.save(done, state, meta, last=last or leave)
                claim.say("running", done)
            if show and show.due(done):
                with clock("preview"):
                    progress.image(done, "preview", show(state, done))
        check_masked(before, done, config.stop_after_bad, progress.note)
        profile.close(done, state)
        with clock("checkpoint"):
            checkpoints.wait()
    return done


def guidance_note(guidance: float, own: float) -> str:
    """What a student is distilled at, beside what its teacher's folder says."""
    beside = "" if guidance == own else f" (its folder says {own:g})"
    return f"the teacher is distilled at guidance {guidance:g}{beside}"


def begin(run: Run, steps: Steps, restore: Restore) -> tuple[int, TrainState]:
    """The step and the state that `restore` finds, or step 0 and what a run starts from."""
    found = restore(shapes_at(jax.eval_shape(run.start, run.first), steps.state))
    if found is None:
        first = put(run.first, steps.state.params["student"])
        return 0, jax.jit(run.start, out_shardings=steps.state)(first)
    step, state, meta = found
    if meta["teacher"] != run.fingerprint:
        raise InputError(
            f"{run.config.teacher}: found weights of fingerprint {run.fingerprint}; expected "
            f"{meta['teacher']}, with which the run was begun"
        )
    return step, state


def host_batches(
    run: Run, steps: Steps, done: int, stop: int
) -> Iterator[tuple[np.uint32, dict[str, jax.Array]]]:
    """Number and global batch of every update of steps done + 1 .. stop, put on the mesh ahead of
    their use; every process makes the samples of its own devices."""
    each = len(steps.order)  # data and keys are numbered by update, the critic's included
    size, sharding = run.config.batch, batch_sharding(run.mesh)
    low, high = rows_here(sharding, size)

    @settled()  # in a thread of its own
    def fetch(number: int):
        rows = run.source.batch(number * size + low, high - low)

        def place(x):
            def part(index):
                begin, end, _ = index[0].indices(size)
                return x[begin - low : end - low]

            return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

        return np.uint32(number), jax.tree.map(place, rows)

    return prefetch(fetch, done * each, stop * each)
