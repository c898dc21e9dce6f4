"""The host's side of training: data in, updates, checkpoints, and something to look at."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gadjax.convert.recipe import Sampling
from gadjax.data.source import prefetch
from gadjax.errors import InputError, RunStopped
from gadjax.models.module import overlay
from gadjax.sampling import clean_latent, initial_noise
from gadjax.storage import tolerant
from gadjax.training.checkpoint import Checkpoints
from gadjax.training.claim import LOCK, Claim
from gadjax.training.compiled import Steps, compile_steps
from gadjax.training.config import as_json, check_resume, write_json
from gadjax.training.goodput import Clock
from gadjax.training.preview import grid, save_png
from gadjax.training.processes import (
    Leaving,
    agree,
    beat,
    check_devices,
    losing_peers,
    together,
)
from gadjax.training.profile import Profile
from gadjax.training.progress import Progress, overview
from gadjax.training.record import write_record
from gadjax.training.setup import Run, encode_raw, prepare
from gadjax.training.sharding import batch_sharding, put, replicated, rows_here, shapes_at
from gadjax.training.state import TrainState
from gadjax.training.trackers import check_trackers


class Watch(NamedTuple):
    """How a start is looked at: where its time goes, and (step, count) of what is profiled."""

    clock: Clock
    profile: tuple[int, int] | None


def train(
    config: ConfigDict,
    workdir: Path,
    devices: int | None = None,
    profile: tuple[int, int] | None = None,
) -> None:
    """Train until `steps`, resuming what the workdir holds; every process of the run calls it.

    devices: how many there have to be in all processes together. profile: (step, count) to trace
    so many steps after that one. `status.json` says how it stands (`gadjax.training.claim`).
    Raises: InputError for a bad config, a workdir of another config or another run, processes that
    run different things; RunStopped where updates stay non-finite or nothing can be saved.
    """
    watch = Watch(Clock(), profile)
    if devices is not None:
        check_devices(devices)
    agree(as_json(config), workdir)
    together(lambda: check_trackers(config.log.trackers))
    together(lambda: _check_workdir(config, workdir))
    run = together(lambda: prepare(config))
    steps = compile_steps(run)
    with together(lambda: _claim(config, workdir)) as claim:
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
        check_resume(json.loads(saved.read_text()), config, workdir)
    elif workdir.exists() and any(path.name != LOCK for path in workdir.iterdir()):
        raise InputError(f"{workdir}: found files but no config.json; expected an empty folder")


def _claim(config: ConfigDict, workdir: Path) -> Claim:
    claim = Claim(workdir, config.steps, mine=jax.process_index() == 0)
    if claim.mine:
        write_json(config, workdir / "config.json")
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
    done, state = _newest(run, steps, checkpoints)
    resumed = done > 0
    claim.say("running", done)
    frozen = put(run.frozen, steps.frozen)
    meta = {"config": as_json(config), "teacher": run.fingerprint}
    show = Preview(run, frozen, workdir) if config.preview.every else None
    critic_updates = config.critic.updates if steps.critic else 0
    each = critic_updates + 1  # data and keys are numbered by update, the critic's included
    before: dict[str, Any] = {}
    with Progress(workdir, config, done, clock) as progress:
        progress.note(f"resumed at step {done}" if resumed else overview(state.params["student"]))
        if show and not resumed:
            progress.image(0, "preview", show(state, 0))
        batches = host_batches(run, done * each, config.steps * each)
        profile = Profile(watch.profile, workdir, progress.note)
        leave = False
        while done < config.steps and not leave:
            beat(done)
            profile.at(done, state)
            metrics: dict[str, Any] = {}
            for place in range(each):
                step = steps.student if place == critic_updates else steps.critic
                update = np.uint32(done * each + place)
                with clock("data"):
                    batch = next(batches)
                state, more = step(state, frozen, batch, update)
                metrics |= more
            done += 1
            leave = leaving.asked(done)
            progress.update(done, metrics)
            if progress.enabled and not before:  # the first step of this start
                write_record(run, steps, workdir, state, frozen, batch, update)
            _stop_if_bad(before, config.stop_after_bad, done - 1)
            before = metrics
            last = done == config.steps
            if done % config.checkpoint.every == 0 or last or leave:
                with clock("checkpoint"):
                    checkpoints.save(done, state, meta)
                claim.say("running", done)
                progress.sync()
            if show and (done % config.preview.every == 0 or last):
                with clock("preview"):
                    progress.image(done, "preview", show(state, done))
        _stop_if_bad(before, config.stop_after_bad, done)
        profile.close(done, state)
        with clock("checkpoint"):
            checkpoints.wait()
    return done


def _newest(run: Run, steps: Steps, checkpoints: Checkpoints) -> tuple[int, TrainState]:
    """The newest checkpoint's step and state, or step 0 and what a run starts from."""
    found = checkpoints.restore(shapes_at(jax.eval_shape(run.start, run.first), steps.state))
    if found is None:
        first = put(run.first, steps.state.params["student"])
        return 0, jax.jit(run.start, out_shardings=steps.state)(first)
    step, state, meta = found
    if meta["teacher"] != run.fingerprint:
        raise InputError(
            f"{run.config.teacher}: found weights of fingerprint {run.fingerprint}; expected "
            f"{meta['teacher']}, with which {checkpoints.folder.parent} was begun"
        )
    return step, state


def _stop_if_bad(metrics: dict[str, Any], most: int, step: int) -> None:
    """Raises: RunStopped once `most` updates in a row were masked for not being finite.

    Called with the metrics of the step before the newest, so that it does not wait for a device.
    """
    for name, value in metrics.items():
        if name.endswith("/bad") and int(value) >= most:
            raise RunStopped(
                f"step {step}: the last {int(value)} updates of the {name.split('/')[0]} were not "
                "finite and were left out; expected finite losses (lower optim.lr, or look at "
                "metrics.jsonl)"
            )


def host_batches(run: Run, start: int, stop: int) -> Iterator[dict[str, jax.Array]]:
    """The global batches of updates start .. stop - 1, put on the mesh ahead of their use; every
    process makes the samples of its own devices."""
    size, sharding = run.config.batch, batch_sharding(run.mesh)
    low, high = rows_here(sharding, size)

    def fetch(update: int):
        rows = run.source.batch(update * size + low, high - low)

        def place(x):
            def part(index):
                begin, end, _ = index[0].indices(size)
                return x[begin - low : end - low]

            return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

        return jax.tree.map(place, rows)

    return prefetch(fetch, start, stop)


class Preview:
    """Fixed prompts and noises drawn by the teacher and by the student's average, as a PNG."""

    def __init__(self, run: Run, frozen: dict[str, Any], workdir: Path):
        self.folder, self.scale = workdir / "previews", run.config.preview.scale
        self.folder.mkdir(exist_ok=True)
        pipeline, recipe = run.pipeline, run.recipe
        needs, count = recipe.objective.needs, run.config.preview.prompts
        raw = run.source.batch(0, count)
        raw = {name: value for name, value in raw.items() if name not in ("image", "x0")}
        noise = initial_noise(run.config.seed, count, pipeline.latent)

        @partial(jax.jit, static_argnums=1, out_shardings=replicated(run.mesh))
        def draw(params, sampling, frozen, raw):
            cond = encode_raw(pipeline, frozen, raw)
            null = encode_raw(pipeline, frozen, frozen["null"])
            null = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), null)
            params = overlay(params, frozen.get("kept"))
            x0 = clean_latent(pipeline, params, sampling, noise, cond, null)
            return pipeline.decode(frozen["vae"], x0)

        many = Sampling(guidance=recipe.guidance)
        few = Sampling(len(recipe.times) - 1, recipe.times[:-1], guidance=1)
        # What is trained by plain denoising is itself sampled as a teacher is.
        own = few if needs.distils else many
        self.draw = lambda params: np.asarray(draw(params, own, frozen, raw))
        self.teacher = None
        if pipeline.body in frozen:
            self.teacher = np.asarray(draw(frozen[pipeline.body], many, frozen, raw))

    def __call__(self, state: TrainState, step: int) -> np.ndarray:
        """Writes the picture of one step, and returns it: uint8 [H, W, 3]."""
        rows = [("student", self.draw(state.ema))]
        if self.teacher is not None:
            rows.insert(0, ("teacher", self.teacher))
        picture = grid(rows, None, self.scale)
        if jax.process_index() == 0:
            with tolerant(self.folder):
                save_png(picture, self.folder / f"{step:07d}.png")
        return np.asarray(picture)
