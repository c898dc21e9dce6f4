"""Adapter from `Denoiser` to PixArt: conditioning inputs, output channels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gadjax.models.pixart.net import Config
from gadjax.types import Cond, Params


def extras(
    config: Config, samples: int, height: int, width: int, pooled: jax.Array | None = None
) -> dict[str, jax.Array] | None:
    """Micro-conditioning of the 1024 models: resolution and aspect ratio; None for the others.

    Args:
      config: the network's options.
      samples: batch size.
      height, width: of the image in pixels.
      pooled: pooled prompt embedding; not an input of this family.
    """
    if not config.size_conditioned:
        return None
    return {
        "resolution": jnp.tile(jnp.array([[height, width]], jnp.float32), (samples, 1)),
        "aspect_ratio": jnp.full((samples, 1), height / width, jnp.float32),
    }


def predictor(apply: Callable, config: Config) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> raw_BHWC without the channels of a learned variance."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        raw = apply(params, x_BHWC, t_B, cond.text, cond.mask, cond.extras)
        return raw[..., : config.in_channels]

    return call


def features(apply: Callable) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond, blocks=()) -> features [B, N, D], see `Denoiser`."""

    def call(params: Params, x_BHWC, t_B, cond: Cond, blocks=()):
        inputs = x_BHWC, t_B, cond.text, cond.mask, cond.extras
        return apply(params, *inputs, blocks=blocks, method="features")

    return call


def torch_inputs(config: Config, cond: Cond) -> dict[str, Any]:
    """Arguments of PixArtTransformer2DModel; it has added_cond_kwargs also without sizes."""
    sizes = {name: (cond.extras or {}).get(name) for name in ("resolution", "aspect_ratio")}
    return {"encoder_attention_mask": cond.mask, "added_cond_kwargs": sizes}
