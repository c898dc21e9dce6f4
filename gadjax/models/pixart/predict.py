"""How a Denoiser calls this family: what it is told, and which of its channels are the answer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gadjax.models.pixart.net import Config
from gadjax.types import Cond, Params

TEXT_KV = "text_kv"  # the method that makes of a text what x and t do not change


def extras(
    config: Config, samples: int, height: int, width: int, pooled: jax.Array | None = None
) -> dict[str, jax.Array] | None:
    """Micro-conditioning of the 1024 models for pictures of height x width pixels, or None.

    pooled: a vector of the text, which this family is not told.
    """
    if not config.size_conditioned:
        return None
    return {
        "resolution": jnp.tile(jnp.array([[height, width]], jnp.float32), (samples, 1)),
        "aspect_ratio": jnp.full((samples, 1), height / width, jnp.float32),
    }


def predictor(apply: Callable, config: Config) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> raw_BHWC without the learned-variance channels."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        raw = apply(params, x_BHWC, t_B, cond.text, cond.mask, cond.extras)
        return raw[..., : config.in_channels]

    return call


def features(apply: Callable) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> [B, N, D], what the network makes of them half-way."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return apply(params, x_BHWC, t_B, cond.text, cond.mask, cond.extras, method="features")

    return call
