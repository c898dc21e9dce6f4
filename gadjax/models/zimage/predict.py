"""Adapter from `Denoiser` to Z-Image: conditioning inputs."""

from collections.abc import Callable
from typing import Any

import jax

from gadjax.models.zimage.config import Config
from gadjax.types import Cond, Params


def extras(config: Config, samples: int, height: int, width: int, pooled=None) -> None:
    """No conditioning besides the prompt."""
    return None


def predictor(apply: Callable, config: Config) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> raw_BHWC, the velocity."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return apply(params, x_BHWC, t_B, cond.text, cond.mask)

    return call


def features(apply: Callable) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond, blocks=()) -> features [B, N, D], see `Denoiser`."""

    def call(params: Params, x_BHWC, t_B, cond: Cond, blocks=()):
        inputs = x_BHWC, t_B, cond.text, cond.mask
        return apply(params, *inputs, blocks=blocks, method="features")

    return call


def torch_inputs(config: Config, cond: Cond) -> dict[str, Any]:
    """Arguments of ZImageTransformer2DModel."""
    return {"encoder_attention_mask": cond.mask}
