"""What a config means: networks, recipe, data, and the two compiled updates."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from gadjax import assets
from gadjax.convert.files import fingerprint
from gadjax.convert.tensors import tensors_from_params
from gadjax.convert.text import text_fingerprint
from gadjax.data.embeddings import open_embeddings
from gadjax.data.prompts import read_prompts
from gadjax.data.source import CachedSource, EmbeddingSource, PromptSource, Source, WorldSource
from gadjax.errors import InputError
from gadjax.models.module import cast
from gadjax.objectives import TERMS, build
from gadjax.pipeline import Pipeline, load_pipeline, random_like
from gadjax.training.sharding import batch_sharding, check_batch, make_mesh, replicated, shardings
from gadjax.training.state import TrainState, create, make_optimizer
from gadjax.training.steps import Recipe, critic_step, student_step
from gadjax.types import Batch, Cond, Params


@dataclass(frozen=True)
class Run:
    """What a config means: the recipe, the frozen networks and the data."""

    config: ConfigDict
    pipeline: Pipeline
    recipe: Recipe
    mesh: Mesh
    source: Source
    frozen: dict[str, Any]
    first: Params  # what student and critic start from
    start: Callable[[Params], TrainState]
    fingerprint: str  # of the teacher's transformer


def prepare(config: ConfigDict) -> Run:
    """Check everything that can be checked, then load. Raises: InputError before device work."""
    times = student_times(config)
    objective = build(config.objective, TERMS, len(times))
    mesh = make_mesh(config.mesh)
    microbatches = check_batch(config.batch, config.microbatch or config.batch, mesh)
    if objective.needs.images and not config.data.world:
        raise InputError("data.world: found nothing; expected a source of pictures for this loss")
    if not config.teacher:
        raise InputError("teacher: found nothing; expected a diffusers pipeline folder")
    dtype = compute_dtype(config.dtype)
    pipeline, params = load_pipeline(
        assets.resolve(config.teacher), dtype=dtype, remat=config.remat
    )
    clean = pipeline.denoiser.schedule.clean
    last = pipeline.denoiser.schedule.last
    if not clean < times[-1] <= times[0] <= last:
        raise InputError(
            f"student.timesteps: found {times}; expected times over {clean:g} and up to {last:g}, "
            "those of the teacher's schedule"
        )
    optim = dict(config.optim)
    optimizers = {"student": make_optimizer(ConfigDict(optim))}
    if objective.needs.critic:
        own = {key: config.critic[key] for key in ("lr", "b1")}
        optimizers["critic"] = make_optimizer(ConfigDict(optim | own))
    recipe = Recipe(
        denoiser=pipeline.denoiser,
        objective=objective,
        times=(*times, clean),
        guidance=float(config.guidance),
        optimizers=optimizers,
        ema=config.ema,
        microbatches=microbatches,
    )
    source, null = open_data(config, pipeline)
    needs_teacher = objective.needs.maps or objective.needs.critic
    frozen = {"null": null} | {
        name: cast(params[name], dtype)
        for name, wanted in (
            ("transformer", needs_teacher),
            ("text_encoder", not config.data.embeddings),
            ("vae", objective.needs.images or config.preview.every),
        )
        if wanted
    }

    first = params["transformer"]
    if config.student.init == "random":
        first = random_like(pipeline.networks["transformer"], config.seed)

    def start(first: Params) -> TrainState:
        first = cast(first, jnp.float32)
        return create({role: jax.tree.map(jnp.copy, first) for role in optimizers}, optimizers)

    part = pipeline.folder.components["transformer"]
    identity = fingerprint(tensors_from_params(part.params, part.module.KEYMAP))
    return Run(config, pipeline, recipe, mesh, source, frozen, first, start, identity)


def compute_dtype(name: str):
    if name not in ("float32", "bfloat16"):
        raise InputError(f"dtype: found {name!r}; expected 'float32' or 'bfloat16'")
    return jnp.dtype(name)


def student_times(config: ConfigDict) -> tuple[float, ...]:
    """The times of the student's steps, latest noise first."""
    times = tuple(float(t) for t in config.student.timesteps)
    if config.student.init not in ("teacher", "random"):
        raise InputError(
            f"student.init: found {config.student.init!r}; expected 'teacher' or 'random'"
        )
    if len(times) != config.student.steps or not times:
        raise InputError(
            f"student.steps: found {config.student.steps}; expected the number of "
            f"student.timesteps ({len(times)})"
        )
    if list(times) != sorted(set(times), reverse=True) or times[-1] < 0:
        raise InputError(f"student.timesteps: found {times}; expected falling times from 0 on")
    return times


def open_data(config: ConfigDict, pipeline: Pipeline) -> tuple[Source, dict[str, np.ndarray]]:
    """The source of prompts (or pictures), and the empty prompt in the same form."""
    data = config.data
    given = [name for name in ("prompts", "embeddings", "world") if data[name]]
    if len(given) != 1:
        raise InputError(
            f"data: found {' and '.join(given) or 'none'}; expected one of prompts, "
            "embeddings, world"
        )
    tokenize = partial(pipeline.tokens, length=data.length)
    if data.embeddings:
        embeddings = open_embeddings(assets.resolve(data.embeddings))
        embeddings.check(text_fingerprint(assets.resolve(config.teacher)), data.length)
        text, mask = embeddings.null
        return EmbeddingSource(embeddings, config.seed), {"text": text[None], "mask": mask[None]}
    ids, mask = tokenize([""])
    null = {"ids": ids, "mask": mask}
    if data.world:
        world = WorldSource(data.world, tokenize, config.seed, data.dropout)
        return (cache_latents(world, pipeline, data.cache) if data.cache else world), null
    prompts = read_prompts(assets.resolve(data.prompts), data.column)
    return PromptSource(*tokenize(prompts), config.seed), null


def cache_latents(source: WorldSource, pipeline: Pipeline, count: int, size: int = 128) -> Source:
    """The first `count` samples of a world with their pictures encoded, once, ahead of training."""
    encode = jax.jit(pipeline.encode_image)
    params = pipeline.folder.components["vae"].params
    parts = []
    for index in tqdm(range(0, count, size), desc="encoding pictures", disable=None):
        batch = source.batch(index, min(size, count - index))
        image = batch.pop("image")
        parts.append(batch | {"x0": np.asarray(encode(params, image))})
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return CachedSource(arrays, source.seed)


def encode_raw(pipeline: Pipeline, frozen: dict[str, Any], raw: dict[str, jax.Array]) -> Cond:
    """Token ids, or embeddings written ahead of time, to what the denoiser is told."""
    if "text" in raw:
        return pipeline.cond(raw["text"].astype(jnp.float32), raw["mask"])
    return pipeline.encode_text(frozen["text_encoder"], raw["ids"], raw["mask"])


def make_batch(
    pipeline: Pipeline, frozen: dict[str, Any], raw: dict[str, jax.Array], seed: int, update
) -> Batch:
    """Host arrays to a Batch. Every sample's key is (seed, update, its place in the batch)."""

    samples = raw["mask"].shape[0]
    now = jax.random.fold_in(jax.random.key(seed), update)
    places = jnp.arange(samples)
    keys = jax.vmap(partial(jax.random.fold_in, now))(places)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), pipeline.latent))(
        keys
    )
    null = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (samples, *x.shape[1:])),
        encode_raw(pipeline, frozen, frozen["null"]),
    )
    offset = jax.random.randint(jax.random.fold_in(now, samples), (), 0, 1 << 20)
    x0 = raw.get("x0")
    if "image" in raw:
        x0 = pipeline.encode_image(frozen["vae"], raw["image"])
    cond = jax.tree.map(lambda x: jax.lax.stop_gradient(x), encode_raw(pipeline, frozen, raw))
    return Batch(cond, null, noise, keys, (places + offset).astype(jnp.int32), x0)


@dataclass(frozen=True)
class Steps:
    """The compiled updates and where the state lives."""

    student: Callable
    critic: Callable | None
    state: Any  # shardings
    frozen: Any


def compile_steps(run: Run) -> Steps:
    """Both updates as sharded jitted functions; the state is donated, the frozen parts are not."""
    mesh, seed = run.mesh, run.config.seed
    parts = run.pipeline.folder.components
    rules = parts["transformer"].module.RULES
    state_sh = shardings(jax.eval_shape(run.start, run.first), rules, mesh)
    frozen_sh = {
        name: shardings(tree, parts[name].module.RULES, mesh)
        if name in parts
        else jax.tree.map(lambda _: replicated(mesh), tree)
        for name, tree in run.frozen.items()
    }
    options = {
        "in_shardings": (state_sh, frozen_sh, batch_sharding(mesh), replicated(mesh)),
        "out_shardings": (state_sh, replicated(mesh)),
        "donate_argnums": 0,
    }

    @partial(jax.jit, **options)
    def student(state, frozen, raw, update):
        batch = make_batch(run.pipeline, frozen, raw, seed, update)
        return student_step(run.recipe, state, frozen.get("transformer"), batch)

    @partial(jax.jit, **options)
    def critic(state, frozen, raw, update):
        batch = make_batch(run.pipeline, frozen, raw, seed, update)
        return critic_step(run.recipe, state, batch)

    needs_critic = run.recipe.objective.needs.critic
    return Steps(student, critic if needs_critic else None, state_sh, frozen_sh)
