"""Adapter from `Denoiser` to Sana: conditioning inputs, output channels.

Timesteps are the scheduler's and guidance scales the user's: the network scales both as diffusers'
pipelines do. For Sprint the caller sets `cond.extras` to {"guidance": [B] float32}, and x and t are
what its pipeline passes to the transformer (t in [0, 1]), not what its scheduler has.
"""

from collections.abc import Callable
from typing import Any

import jax

from gadjax.models.sana.net import Config
from gadjax.types import Cond, Params


def extras(config: Config, samples: int, height: int, width: int, pooled=None) -> None:
    """No conditioning besides the prompt; the guidance scale of Sprint is the caller's to set."""
    return None


def _guidance(cond: Cond) -> jax.Array | None:
    return (cond.extras or {}).get("guidance")


def predictor(apply: Callable, config: Config) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> raw_BHWC without the channels of a learned variance."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        raw = apply(params, x_BHWC, t_B, cond.text, cond.mask, _guidance(cond))
        return raw[..., : config.in_channels]

    return call


def features(apply: Callable) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond, blocks=()) -> features [B, N, D], see `Denoiser`."""

    def call(params: Params, x_BHWC, t_B, cond: Cond, blocks=()):
        inputs = x_BHWC, t_B, cond.text, cond.mask, _guidance(cond)
        return apply(params, *inputs, blocks=blocks, method="features")

    return call


def torch_inputs(config: Config, cond: Cond) -> dict[str, Any]:
    """Arguments of SanaTransformer2DModel, whose pipeline scales the guidance (Sprint)."""
    mask, guidance_B = {"encoder_attention_mask": cond.mask}, _guidance(cond)
    if guidance_B is None:
        return mask
    return mask | {"guidance": guidance_B * config.guidance_embeds_scale}
