"""Data source of a training run, and fingerprints of its inputs."""

from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from gadjax import assets
from gadjax.data import fingerprints
from gadjax.data.embeddings import open_embeddings
from gadjax.data.images import open_images
from gadjax.data.prompts import read_prompts
from gadjax.data.source import (
    CachedSource,
    EmbeddingSource,
    ImageSource,
    LatentSource,
    PromptSource,
    Source,
    WorldSource,
)
from gadjax.data.versions import check_versions, matching, versions
from gadjax.errors import InputError
from gadjax.formats.fingerprints import image_fingerprint, text_fingerprint
from gadjax.pipelines.pipeline import Pipeline

WITH_PICTURES = ("world", "images", "latents")
SOURCES = ("prompts", "embeddings", *WITH_PICTURES)


def open_data(config: ConfigDict, pipeline: Pipeline) -> tuple[Source, dict[str, np.ndarray]]:
    """Source of prompts or pictures for a config, and the empty prompt in the same form.

    The empty prompt is token ids and mask, or its embeddings, [1, ...] each.

    Raises: InputError for no source or several, and for data that does not fit the teacher.
    """
    data = config.data
    given = [name for name in SOURCES if data[name]]
    if len(given) != 1:
        raise InputError(
            f"data: found {' and '.join(given) or 'none'}; expected one of {', '.join(SOURCES)}"
        )
    check_versions(data)
    if data.cache and not data.world:
        raise InputError(
            f"data.cache: found {data.cache} without data.world; expected 0 (gadjax embed --images "
            "encodes a folder's pictures ahead of time)"
        )
    tokenize = partial(pipeline.tokens, length=data.length)
    if data.embeddings or data.latents:
        embeddings = open_embeddings(assets.resolve(data.embeddings or data.latents))
        identity = text_fingerprint(assets.resolve(config.teacher))
        embeddings.check(identity, pipeline.prompts.embed_length(data.length))
        null = {name: value[None] for name, value in embeddings.null.items()}
        if data.embeddings:
            return EmbeddingSource(embeddings, config.seed), null
        vae = pipeline.folder.components["vae"]
        embeddings.check_latents(image_fingerprint(vae), pipeline.latent)
        return LatentSource(embeddings, config.seed, data.dropout), null
    ids, mask = pipeline.prompts.negative_tokens(None, data.length)
    null = {"ids": ids, "mask": mask}
    sides = tuple(side * pipeline.upscale for side in pipeline.latent[:2])
    if data.world:
        world = WorldSource(data.world, tokenize, config.seed, data.dropout)
        if (size := world.batch(0, 1)["image"].shape[1:3]) != sides:
            raise InputError(
                f"data.world: found pictures of {size[0]} x {size[1]} in {data.world}; expected "
                f"{sides[0]} x {sides[1]}, as the teacher draws"
            )
        return (cache_latents(world, pipeline, data.cache) if data.cache else world), null
    if data.images:
        pictures = open_images(assets.resolve(data.images), data.column, data.background)
        return ImageSource(pictures, sides, tokenize, config.seed, data.dropout), null
    prompts = matching(read_prompts(assets.resolve(data.prompts), data.column), data.match)
    prompts, override = versions(prompts, data, tokenize)
    return PromptSource(*tokenize(prompts), config.seed, override), null


def input_fingerprints(config: ConfigDict, source: Source) -> dict[str, str]:
    """Fingerprints of a run's inputs by key of the config, for inputs whose contents may change.

    The teacher's is of its text encoders: its backbone has one of its own (`Run.fingerprint`).
    """
    data = config.data
    inputs = {"teacher": text_fingerprint(assets.resolve(config.teacher))}
    if data.prompts:
        prompts = read_prompts(assets.resolve(data.prompts), data.column)
        inputs["data.prompts"] = fingerprints.fingerprint_prompts(prompts)
    if data.images:
        inputs["data.images"] = fingerprints.fingerprint_pictures(source.pictures)
    for name in ("embeddings", "latents"):
        if data[name]:
            inputs[f"data.{name}"] = fingerprints.fingerprint_embeddings(source.embeddings)
    return inputs


def cache_latents(source: WorldSource, pipeline: Pipeline, count: int, size: int = 128) -> Source:
    """Source of a world's first `count` samples, with their pictures encoded ahead of training.

    Args:
      source: the world.
      pipeline: the teacher's pipeline, whose autoencoder encodes.
      count: number of samples.
      size: pictures encoded at once.
    """
    encode = jax.jit(pipeline.encode_image)
    params = pipeline.folder.components["vae"].params
    if params is None:  # a plan, which asks for the shapes of a sample

        def encode(_, image):
            return np.zeros((len(image), *pipeline.latent), np.float32)

        count = 1
    parts = []
    for index in tqdm(range(0, count, size), desc="encoding pictures", disable=None):
        batch = source.batch(index, min(size, count - index))
        image = batch.pop("image")
        parts.append(batch | {"x0": np.asarray(encode(params, image))})
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return CachedSource(arrays, source.seed)
