"""Preview images of a run, from the same prompts and noises every time."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gadjax import assets
from gadjax.errors import InputError
from gadjax.features.open import open_extractor
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.io.image_grid import grid, save_png
from gadjax.io.storage import warn_on_write_error
from gadjax.parallel.sharding import replicated
from gadjax.pipelines.sampling import clean_latent, initial_noise
from gadjax.runtime.progress import Progress
from gadjax.training.batch import encode_raw
from gadjax.training.health import Health, earlier_rows, report_alarms
from gadjax.training.setup import Run
from gadjax.training.signals import Drawn, extract
from gadjax.training.state import TrainState
from gadjax.training.steps import complete_student

MAX_COLUMNS = 8  # of a sheet, where it has no more prompts
STRONG = 1.25  # times the guidance of the teacher's folder: its pictures are compared with those


class Preview:
    """Preview grids (PNG) and health.jsonl: fixed prompts and noises, sampled by teacher and
    student EMA."""

    def __init__(
        self, run: Run, frozen: dict[str, Any], workdir: Path, done: int, progress: Progress
    ):
        """Draw the teacher's pictures.

        Args:
          run: the prepared run.
          frozen: its frozen parameters, on the mesh.
          workdir: gets the folder of previews.
          done: steps that are done.
          progress: receives pictures, signals and alarms.
        """
        loop_spec = run.loop_spec
        self.progress, self.stop_when = progress, loop_spec.stop_when
        self.folder, self.scale = workdir / "previews", loop_spec.preview_scale
        self.every, self.last = loop_spec.preview_every, loop_spec.steps
        self.tolerate_errors = loop_spec.failures > 0
        with warn_on_write_error(self.folder, self.tolerate_errors):
            self.folder.mkdir(exist_ok=True)
        if run.extractor:
            progress.note(f"preview.features: {run.extractor}")
        pipeline, step_spec = run.pipeline, run.step_spec
        needs, seeds = step_spec.objective.needs, loop_spec.preview_seeds
        count = loop_spec.preview_prompts
        raw = run.source.batch(0, count)
        raw = {name: value for name, value in raw.items() if name not in ("image", "x0")}
        noises = initial_noise(run.seed, count * seeds, pipeline.latent)

        @partial(jax.jit, static_argnums=(1, 2), out_shardings=replicated(run.mesh))
        def latent(params, sampling, is_student, frozen, raw, noise):
            cond = encode_raw(pipeline, frozen, raw)
            null = encode_raw(pipeline, frozen, frozen["null"])
            null = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), null)
            if is_student:
                params = complete_student(params, run.networks(frozen))
            return clean_latent(pipeline, params, sampling, noise, cond, null)

        # One program for teacher and student, which are sampled by two.
        decode = jax.jit(pipeline.decode, out_shardings=replicated(run.mesh))

        def draw(params, sampling, is_student=False):
            # Noise by noise: memory holds one picture of each prompt at a time.
            parts = []
            for seed in range(seeds):
                x0 = latent(params, sampling, is_student, frozen, raw, noises[seed::seeds])
                parts.append((np.asarray(x0), np.asarray(decode(frozen["vae"], x0))))
            x0_PSHWC, images_PSHWC = (np.stack(part, 1) for part in zip(*parts, strict=True))
            features = run.extractor and extract(run.extractor, images_PSHWC)
            return Drawn(x0_PSHWC, images_PSHWC, features)

        many_step = SamplingConfig(guidance=step_spec.guidance)
        times = step_spec.times[:-1]
        embedded = step_spec.denoiser.default_guidance
        few_step = SamplingConfig(len(times), times, embedded, rollout=step_spec.rollout)
        # A network trained by plain denoising is sampled like a teacher.
        student_sampling = few_step if needs.is_few_step else many_step
        self.draw = lambda params: draw(params, student_sampling, is_student=True)
        self.teacher = weaker = None
        if pipeline.backbone in frozen:
            self.teacher = draw(frozen[pipeline.backbone], many_step)
            if step_spec.guidance > STRONG * pipeline.folder_guidance:
                weaker_sampling = SamplingConfig(guidance=pipeline.folder_guidance)
                weaker = draw(frozen[pipeline.backbone], weaker_sampling)
        self.per_prompt = max(1, MAX_COLUMNS // count)  # noises of a prompt on the sheet
        self.health = Health(earlier_rows(workdir, done), self.teacher, weaker)

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.last

    def show(self, state: TrainState, step: int) -> None:
        """Write the preview of one step and its signals, and log their alarms.

        Raises: RunStopped for an alarm of a signal in preview.stop_when.
        """
        student = self.draw(state.ema)
        rows = [("student", student)]
        if self.teacher is not None:
            rows.insert(0, ("teacher", self.teacher))
        sheet = grid([(label, self._shown(drawn)) for label, drawn in rows], None, self.scale)
        if jax.process_index() == 0:
            with warn_on_write_error(self.folder, self.tolerate_errors):
                save_png(sheet, self.folder / f"{step:07d}.png")
        self.progress.image(step, "preview", np.asarray(sheet))
        before, row = self.health.alarms, self.health(step, student)
        self.progress.health(row)
        report_alarms(row, before, self.stop_when, self.progress.note)

    def _shown(self, drawn: Drawn) -> np.ndarray:
        """Pictures [N, H, W, 3] of a sheet's row."""
        images = drawn.images_PSHWC[:, : self.per_prompt]
        return images.reshape(-1, *images.shape[2:])


def with_extractor(run: Run) -> Run:
    """The run with the feature network of its previews, `preview.features`, where it has one.

    Raises: InputError for files that are missing or unsupported.
    """
    preview = run.config.preview
    if not (preview.every and preview.features):
        return run
    try:
        path = assets.resolve(preview.features)
        return replace(run, extractor=open_extractor("preview.features", path))
    except InputError as error:
        raise InputError(f"preview.features: {error}") from None
