"""Adapter from `Denoiser` to the U-Net: conditioning inputs, features of the middle block."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.models.unet.config import Config
from gadjax.types import Cond, Params


def extras(
    config: Config, samples: int, height: int, width: int, pooled: jax.Array | None = None
) -> dict[str, jax.Array] | None:
    """Micro-conditioning of SDXL and its pooled prompt embedding; None for the other U-Nets.

    Args:
      config: the network's options.
      samples: batch size.
      height, width: of the uncropped image in pixels.
      pooled: pooled prompt embedding [samples, P].

    Raises: InputError if SDXL is given no pooled embedding.
    """
    if config.pooled_dim is None:
        return None
    if pooled is None:
        raise InputError("pooled: found nothing; expected the text's pooled vector")
    # Original size, top left corner of the crop, size after it.
    ids = jnp.array([[height, width, 0, 0, height, width]], jnp.float32)
    return {"text_embeds": pooled, "time_ids": jnp.tile(ids, (samples, 1))}


def predictor(apply: Callable, config: Config) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> raw_BHWC. No attention mask: training attended to padding."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return apply(params, x_BHWC, t_B, cond.text, cond.extras)

    return call


def features(apply: Callable) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> features [B, N, D]: the middle block's output, row by row."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return apply(params, x_BHWC, t_B, cond.text, cond.extras, method="features")

    return call


def torch_inputs(config: Config, cond: Cond) -> dict[str, Any]:
    """Arguments of UNet2DConditionModel."""
    return {"added_cond_kwargs": cond.extras or {}}
