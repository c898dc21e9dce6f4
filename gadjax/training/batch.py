"""Training batches: host arrays to noise, keys and conditioning on the device."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gadjax.pipelines.pipeline import Pipeline
from gadjax.types import Batch, Cond


def encode_raw(pipeline: Pipeline, frozen: dict[str, Any], raw: dict[str, jax.Array]) -> Cond:
    """Conditioning of a batch, from token ids or from embeddings written ahead of time.

    Args:
      pipeline: the teacher's pipeline.
      frozen: parameters of its text encoders by name; unused where `raw` has embeddings.
      raw: "ids" and "mask" [B, L]; or "text" [B, L, D], "mask" and, in some families, "pooled".
    """
    if "text" in raw:
        pooled = raw["pooled"].astype(jnp.float32) if "pooled" in raw else None
        return pipeline.cond(raw["text"].astype(jnp.float32), raw["mask"], pooled)
    return pipeline.encode_text(frozen, raw["ids"], raw["mask"])


def make_batch(
    pipeline: Pipeline, frozen: dict[str, Any], raw: dict[str, jax.Array], key: jax.Array, update
) -> Batch:
    """Batch of one update: conditioning, initial noise, and clean latents of pictures.

    A sample's key depends on the run's key, the update and its place in the batch, on nothing else.

    Args:
      pipeline: the teacher's pipeline.
      frozen: parameters by network, and the empty prompt under "null".
      raw: host arrays of the data source, the samples first.
      key: the run's key.
      update: number of the update, the critic's included.
    """
    samples = raw["mask"].shape[0]
    now = jax.random.fold_in(key, update)
    places = jnp.arange(samples)
    keys = jax.vmap(partial(jax.random.fold_in, now))(places)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), pipeline.latent))(
        keys
    )
    null = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (samples, *x.shape[1:])),
        encode_raw(pipeline, frozen, frozen["null"]),
    )
    # Even: neighbours are a pair to `stratified_step_indices`.
    offset = 2 * jax.random.randint(jax.random.fold_in(now, samples), (), 0, 1 << 20)
    x0 = raw.get("x0")
    if "image" in raw and "vae" in frozen:  # without it no term reads pictures
        x0 = pipeline.encode_image(frozen["vae"], raw["image"])
    cond = jax.tree.map(lambda x: jax.lax.stop_gradient(x), encode_raw(pipeline, frozen, raw))
    stratum = (places + offset).astype(jnp.int32)
    return Batch(cond, null, noise, keys, stratum, x0, *_override(pipeline, frozen, raw))


def _override(pipeline: Pipeline, frozen: dict[str, Any], raw: dict[str, jax.Array]):
    """Conditioning of the prompts as teachers read them, and its labels; () without any."""
    if "label" not in raw:
        return ()
    other = {"ids": raw["override_ids"], "mask": raw["override_mask"]}
    cond = encode_raw(pipeline, frozen, other)
    return jax.tree.map(jax.lax.stop_gradient, cond), raw["label"]
