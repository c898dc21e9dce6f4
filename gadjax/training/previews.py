"""Preview images of a run, from the same prompts and noises every time."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.formats.sampling_config import SamplingConfig
from gadjax.io.image_grid import grid, save_png
from gadjax.io.storage import warn_on_write_error
from gadjax.models.params import merge_params
from gadjax.parallel.sharding import replicated
from gadjax.pipelines.sampling import clean_latent, initial_noise
from gadjax.training.batch import encode_raw
from gadjax.training.setup import Run
from gadjax.training.state import TrainState


class Preview:
    """Preview grids (PNG): fixed prompts and noises, sampled by teacher and student EMA."""

    def __init__(self, run: Run, frozen: dict[str, Any], workdir: Path):
        loop_spec = run.loop_spec
        self.folder, self.scale = workdir / "previews", loop_spec.preview_scale
        self.every, self.last = loop_spec.preview_every, loop_spec.steps
        self.tolerate_errors = loop_spec.failures > 0
        with warn_on_write_error(self.folder, self.tolerate_errors):
            self.folder.mkdir(exist_ok=True)
        pipeline, step_spec = run.pipeline, run.step_spec
        needs, count = step_spec.objective.needs, loop_spec.preview_prompts
        raw = run.source.batch(0, count)
        raw = {name: value for name, value in raw.items() if name not in ("image", "x0")}
        noise = initial_noise(run.seed, count, pipeline.latent)

        @partial(jax.jit, static_argnums=1, out_shardings=replicated(run.mesh))
        def latent(params, sampling, frozen, raw):
            cond = encode_raw(pipeline, frozen, raw)
            null = encode_raw(pipeline, frozen, frozen["null"])
            null = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), null)
            params = merge_params(params, run.base("student", frozen))
            return clean_latent(pipeline, params, sampling, noise, cond, null)

        # One program for teacher and student, which are sampled by two.
        decode = jax.jit(pipeline.decode, out_shardings=replicated(run.mesh))

        def draw(params, sampling):
            return np.asarray(decode(frozen["vae"], latent(params, sampling, frozen, raw)))

        many_step = SamplingConfig(guidance=step_spec.guidance)
        times = step_spec.times[:-1]
        embedded = step_spec.denoiser.default_guidance
        few_step = SamplingConfig(len(times), times, embedded, rollout=step_spec.rollout)
        # A network trained by plain denoising is sampled like a teacher.
        student_sampling = few_step if needs.is_few_step else many_step
        self.draw = lambda params: draw(params, student_sampling)
        self.teacher = None
        if pipeline.backbone in frozen:
            self.teacher = draw(frozen[pipeline.backbone], many_step)

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.last

    def __call__(self, state: TrainState, step: int) -> np.ndarray:
        """Write the preview of one step and return it: uint8 [H, W, 3]."""
        rows = [("student", self.draw(state.ema))]
        if self.teacher is not None:
            rows.insert(0, ("teacher", self.teacher))
        sheet = grid(rows, None, self.scale)
        if jax.process_index() == 0:
            with warn_on_write_error(self.folder, self.tolerate_errors):
                save_png(sheet, self.folder / f"{step:07d}.png")
        return np.asarray(sheet)
