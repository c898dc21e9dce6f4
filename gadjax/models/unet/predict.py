"""How a Denoiser calls this family: what it is told, and what it sees half-way."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.models.unet.config import Config
from gadjax.types import Cond, Params

TEXT_KV = "text_kv"  # the method that makes of a text what x and t do not change


def extras(
    config: Config, samples: int, height: int, width: int, pooled: jax.Array | None = None
) -> dict[str, jax.Array] | None:
    """What SDXL is told beside its tokens, for whole pictures of height x width pixels, or None.

    pooled: [samples, P], the text as one vector. Raises: InputError without it where it is needed.
    """
    if config.pooled_dim is None:
        return None
    if pooled is None:
        raise InputError("pooled: found nothing; expected the text's pooled vector")
    # Original size, top left corner of the crop, size after it.
    ids = jnp.array([[height, width, 0, 0, height, width]], jnp.float32)
    return {"text_embeds": pooled, "time_ids": jnp.tile(ids, (samples, 1))}


def predictor(apply: Callable, config: Config) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> raw_BHWC. The mask is not read: padding was trained on."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return apply(params, x_BHWC, t_B, cond.text, cond.extras)

    return call


def features(apply: Callable) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> [B, N, D], the middle block's output, row by row."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return apply(params, x_BHWC, t_B, cond.text, cond.extras, method="features")

    return call
