"""Sample images with a pipeline: prompts and initial noise to arrays."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.samplers import Sampler, same_noise, sample
from gadjax.errors import InputError
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.formats.scheduler_config import PIXART, TCD, student_scheduler_config
from gadjax.formats.schedulers import sampler_from_config, with_eta
from gadjax.models.layers import mask_bias
from gadjax.parallel.sharding import batch_sharding, make_mesh, replicated
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import Pipeline
from gadjax.runtime.settings import pinned_jax_config
from gadjax.seeds import make_key
from gadjax.types import Cond, NegativeKV, Params, TextKV

BATCH = 64
MAX_FEW_STEPS = 16  # of a distilled student
PROGRAMS = 4  # kept: a model of an evaluation has three
_programs: dict[bytes, jax.stages.Compiled] = {}


def initial_noise(seed: int, count: int, latent: tuple[int, int, int]) -> np.ndarray:
    """Initial noise [count, H, W, C], standard normal; row i depends on (seed, i), not on count."""
    return noise_rows([seed] * count, np.arange(count), latent)


@pinned_jax_config()
def noise_rows(
    seeds_N: Sequence[int], rows_N: np.ndarray, latent: tuple[int, int, int]
) -> np.ndarray:
    """Rows of `initial_noise` [N, H, W, C]: number rows_N[n] of seed seeds_N[n].

    Args:
      seeds_N: seeds.
      rows_N: numbers of rows.
      latent: shape (H, W, C) of a noise.
    """
    different = {seed: number for number, seed in enumerate(dict.fromkeys(seeds_N))}
    keys_K = jnp.stack([make_key(seed) for seed in different])
    numbers_N = np.array([different[seed] for seed in seeds_N])
    return np.asarray(_normal_rows(keys_K, numbers_N, np.asarray(rows_N), latent))


@partial(jax.jit, static_argnums=3)
def _normal_rows(keys_K, numbers_N, rows_N, latent: tuple[int, int, int]) -> jax.Array:
    keys_N = jax.vmap(jax.random.fold_in)(keys_K[numbers_N], rows_N)
    return jax.vmap(lambda key: jax.random.normal(key, latent, jnp.float32))(keys_N)


class Noises(Protocol):
    """Noises [N, H, W, C]: an array, or what makes rows of one when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


def sampler_and_times(pipeline: Pipeline, sampling: SamplingConfig) -> tuple[Sampler, np.ndarray]:
    """Sampler and its times [steps + 1] for sampling settings.

    Raises: InputError for steps, timesteps or an eta that the folder's scheduler does not support.
    """
    sampler = with_eta(pipeline.sampler, sampling.eta)
    if sampling.timesteps is None:
        times = sampler.times(sampling.steps)
        if sampling.steps == 1 and pipeline.folder.pipeline == PIXART:
            times[-1] = sampler.schedule.clean  # after a single step it uses x0
        return sampler, times
    if sampling.rollout == "fixed_noise":
        sampler = Sampler(pipeline.denoiser.schedule, sampler.grid, sample_fn=same_noise)
    elif not sampler.stochastic:
        config = student_scheduler_config(
            pipeline.folder.scheduler, sampling.timesteps, rollout=sampling.rollout
        )
        sampler = sampler_from_config(config, pipeline.folder.pipeline)
    return sampler, sampler.times(timesteps=sampling.timesteps)


def few_step_settings(
    pipeline: Pipeline, sampling: SamplingConfig
) -> tuple[tuple[float, ...], str] | None:
    """Times at which a few-step student's steps start, noisiest first, and its rollout.

    Returns: None for a model with classifier-free guidance, or of more than MAX_FEW_STEPS steps.
    Raises: InputError as `sampler_and_times`, and for TCD's steps, which are no student's rollout.
    """
    if pipeline.guided(sampling.guidance) or sampling.steps > MAX_FEW_STEPS:
        return None
    if pipeline.folder.scheduler["_class_name"] == TCD:
        raise InputError(
            f"{pipeline.folder.path}: found {TCD}; expected LCMScheduler or one of deterministic "
            "steps for a student, which ends at x0"
        )
    sampler, times = sampler_and_times(pipeline, sampling)
    rollout = "fresh_noise" if sampler.stochastic else sampling.rollout
    return tuple(float(t) for t in np.asarray(times)[:-1]), rollout


def clean_latent(
    pipeline: Pipeline, params: Params, sampling: SamplingConfig, z_BHWC, cond: Cond, null: Cond
) -> jax.Array:
    """Sampling map from initial noise to x0: all steps of the sampler; differentiable.

    Args:
      pipeline: the pipeline.
      params: parameters of the denoiser.
      sampling: steps, timesteps and guidance.
      z_BHWC: initial noise, standard normal.
      cond: conditioning.
      null: conditioning of the negative prompt; unused without guidance.

    Returns: clean latents x0 [B, H, W, C].
    """
    sampler, times = sampler_and_times(pipeline, sampling)
    if sampling.scale != 1:
        z_BHWC = sampling.scale * z_BHWC
    denoiser = pipeline.denoiser
    scale = denoiser.guidance_scale(sampling.guidance)
    if sampling.nasa:
        cond = subtract_negative(denoiser, params, cond, null, sampling.nasa)
        return sample(
            lambda x, t: denoiser.guided(params, x, t, cond, null, scale), sampler, z_BHWC, times
        )
    predict = denoiser.guided_fn(params, cond, null, scale)
    return sample(predict, sampler, z_BHWC, times)


def subtract_negative(
    denoiser: Denoiser, params: Params, cond: Cond, null: Cond, scale: float
) -> Cond:
    """Conditioning whose cross-attention is Z(prompt) - scale Z(negative prompt), before the output
    projection of each layer: NASA (SNOOPI, arXiv 2412.02687), for students without guidance.

    Args:
      denoiser: of a family with a KV cache of the prompt.
      params: of the network.
      cond, null: conditioning of the prompts and of the negative prompt.
      scale: of what is subtracted.
    """
    bias = mask_bias(null.mask)

    def both(kv: TextKV, minus: TextKV) -> TextKV:
        layers = len(kv.k)
        stacked = jnp.broadcast_to(bias, (layers, *bias.shape))
        return kv._replace(negative=NegativeKV(minus.k, minus.v, stacked, jnp.full(layers, scale)))

    texts = (denoiser.cache_text(params, c).text for c in (cond, null))
    return cond._replace(text=jax.tree.map(both, *texts, is_leaf=lambda x: isinstance(x, TextKV)))


def draw(
    model: Model,
    prompts: Sequence[str],
    noise_NHWC: np.ndarray,
    *,
    batch: int = BATCH,
    progress: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """Sample one image per prompt.

    Args:
      model: pipeline, parameters and sampling settings.
      prompts: N prompts.
      noise_NHWC: initial noise of each image.
      batch: images per compiled call.
      progress: called after each batch with its number of images.

    Returns: images, float32 [N, H, W, 3] in [-1, 1].
    """
    return np.concatenate(
        list(draw_batches(model, prompts, noise_NHWC, batch=batch, progress=progress))
    )


def draw_batches(
    model: Model,
    prompts: Sequence[str],
    noise_NHWC: Noises,
    *,
    batch: int = BATCH,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[np.ndarray]:
    """Yield the images of `draw` batch by batch, so that a caller need not hold them all."""
    pipeline = model.pipeline

    def images(params, z, cond, null):
        x0 = clean_latent(pipeline, params[pipeline.backbone], model.sampling, z, cond, null)
        return pipeline.decode(params["vae"], x0)

    return stream_prompts(images, model, prompts, (noise_NHWC,), batch=batch, progress=progress)


def map_prompts(
    f: Callable[..., jax.Array],
    model: Model,
    prompts: Sequence[str],
    arrays: tuple[Noises, ...],
    *,
    batch: int = BATCH,
    progress: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """Map a function over prompts in batches, with one compilation: the last batch is padded.

    Args:
      f: (params, *arrays, cond, null) -> array with the batch axis first.
      model: pipeline, parameters by network, prompt length and negative prompt.
      prompts: N prompts.
      arrays: further inputs, [N, ...].
      batch: prompts per compiled call.
      progress: called after each batch with its number of prompts.

    Returns: the outputs, concatenated to [N, ...].
    """
    return np.concatenate(
        list(stream_prompts(f, model, prompts, arrays, batch=batch, progress=progress))
    )


def stream_prompts(
    f: Callable[..., jax.Array],
    model: Model,
    prompts: Sequence[str],
    arrays: tuple[Noises, ...],
    *,
    batch: int = BATCH,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[np.ndarray]:
    """Yield the outputs of `map_prompts` batch by batch.

    A batch is split over this process's devices, the parameters are on every one of them.
    """
    pipeline, sampling = model.pipeline, model.sampling
    count = len(prompts)
    batch = min(batch, count)
    # One sample is not worth the parameters on every device.
    mesh = make_mesh({"data": -1}, jax.local_devices()[: None if batch > 1 else 1])
    batch = -(-batch // mesh.size) * mesh.size
    inputs = (*arrays, *pipeline.tokens(prompts, sampling.length))
    everywhere, split = replicated(mesh), batch_sharding(mesh)
    negative_tokens = pipeline.prompts.negative_tokens(sampling.negative, sampling.length)
    params, negative_tokens = jax.device_put((model.params, negative_tokens), everywhere)

    @partial(jax.jit, out_shardings=split)
    def run(params, inputs, negative_tokens):
        *arrays, ids, mask = inputs
        null = pipeline.encode_text(params, *negative_tokens)
        null = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), null)
        return f(params, *arrays, pipeline.encode_text(params, ids, mask), null)

    program = None
    for start in range(0, count, batch):
        indices = np.minimum(np.arange(start, start + batch), count - 1)
        rows = jax.device_put(tuple(x[indices] for x in inputs), split)
        program = program or compile_once(run.lower(params, rows, negative_tokens))
        part = program(params, rows, negative_tokens)
        done = min(batch, count - start)
        yield np.asarray(part)[:done]
        progress(done)


def compile_once(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a program, unless one of the last PROGRAMS was the same: a teacher and students of
    one network differ in their parameters alone, which are inputs."""
    text = f"{lowered.in_tree}{lowered.out_tree}{lowered.as_text()}"
    key = hashlib.blake2b(text.encode()).digest()
    program = _programs.pop(key, None) or lowered.compile()
    _programs[key] = program  # the newest last
    if len(_programs) > PROGRAMS:
        _programs.pop(next(iter(_programs)), None)
    return program
