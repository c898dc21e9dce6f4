"""The host's side of training: data in, updates, checkpoints, and something to look at."""

import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gadjax.convert.recipe import Sampling
from gadjax.data.source import prefetch
from gadjax.errors import InputError, RunStopped
from gadjax.models.module import overlay
from gadjax.sampling import clean_latent, initial_noise
from gadjax.training.checkpoint import Checkpoints
from gadjax.training.compiled import Steps, compile_steps
from gadjax.training.config import as_json, check_resume, write_json
from gadjax.training.preview import grid, save_png
from gadjax.training.progress import Progress, overview
from gadjax.training.setup import Run, encode_raw, prepare
from gadjax.training.sharding import batch_sharding, shapes_at
from gadjax.training.state import TrainState


def train(config: ConfigDict, workdir: Path) -> None:
    """Train until `steps`, resuming what the workdir holds.

    `status.json` says how it ended: "done", or "saved" on SIGTERM or SIGINT.
    Raises: InputError for a bad config or a workdir of another config, RunStopped where updates
    stay non-finite or nothing can be saved.
    """
    saved = workdir / "config.json"
    if saved.exists():
        check_resume(json.loads(saved.read_text()), config, workdir)
    elif workdir.exists() and any(workdir.iterdir()):
        raise InputError(f"{workdir}: found files but no config.json; expected an empty folder")
    run = prepare(config)
    steps = compile_steps(run)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(config, saved)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    try:
        with _Signals() as signals:
            step = _loop(run, steps, checkpoints, workdir, signals)
    finally:
        checkpoints.close()
    status = {"status": "done" if step == config.steps else "saved", "step": step}
    (workdir / "status.json").write_text(json.dumps(status) + "\n")


class _Signals:
    """Turns the first SIGTERM or SIGINT into a request to save and leave."""

    def __enter__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(number, self.before[number])  # a second one ends the process as usual

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _loop(run: Run, steps: Steps, checkpoints: Checkpoints, workdir: Path, signals) -> int:
    """Returns the number of steps done."""
    config = run.config
    abstract = shapes_at(jax.eval_shape(run.start, run.first), steps.state)
    found = checkpoints.restore(abstract)
    if found and found[2]["teacher"] != run.fingerprint:
        raise InputError(
            f"{config.teacher}: found weights of fingerprint {run.fingerprint}; expected "
            f"{found[2]['teacher']}, with which {workdir} was begun"
        )
    done = found[0] if found else 0
    if found:
        state = found[1]
    else:
        first = jax.device_put(run.first, steps.state.params["student"])
        state = jax.jit(run.start, out_shardings=steps.state)(first)
    frozen = jax.device_put(run.frozen, steps.frozen)
    meta = {"config": as_json(config), "teacher": run.fingerprint}
    show = Preview(run, frozen, workdir) if config.preview.every else None
    critic_updates = config.critic.updates if steps.critic else 0
    each = critic_updates + 1  # data and keys are numbered by update, the critic's included
    before: dict[str, Any] = {}
    with Progress(workdir, config.steps, done, config.batch, config.log.every) as progress:
        progress.note(f"resumed at step {done}" if found else overview(state.params["student"]))
        if show and not found:
            progress.image(0, "preview", show(state, 0))
        batches = host_batches(run, done * each, config.steps * each)
        while done < config.steps and not signals.asked:
            metrics: dict[str, Any] = {}
            for place in range(each):
                step = steps.student if place == critic_updates else steps.critic
                update = jnp.uint32(done * each + place)
                state, more = step(state, frozen, next(batches), update)
                metrics |= more
            done += 1
            progress.update(done, metrics)
            _stop_if_bad(before, config.stop_after_bad, done - 1)
            before = metrics
            last = done == config.steps
            if done % config.checkpoint.every == 0 or last or signals.asked:
                checkpoints.save(done, state, meta)
            if show and (done % config.preview.every == 0 or last):
                progress.image(done, "preview", show(state, done))
        _stop_if_bad(before, config.stop_after_bad, done)
        checkpoints.wait()
    return done


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
    """The global batches of updates start .. stop - 1, put on the mesh ahead of their use."""
    size, sharding = run.config.batch, batch_sharding(run.mesh)

    def fetch(update: int):
        return jax.device_put(run.source.batch(update * size, size), sharding)

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

        @partial(jax.jit, static_argnums=1)
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
        save_png(picture, self.folder / f"{step:07d}.png")
        return np.asarray(picture)
