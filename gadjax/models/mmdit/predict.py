"""Adapter from `Denoiser` to MMDiT (SD3): conditioning inputs, no attention mask."""

from collections.abc import Callable
from typing import Any

import jax

from gadjax.errors import InputError
from gadjax.models.mmdit.config import Config
from gadjax.types import Cond, Params


def extras(
    config: Config, samples: int, height: int, width: int, pooled: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Conditioning besides the prompt: the pooled embedding; the image's size is no input.

    Args:
      config: the network's options.
      samples: batch size.
      height, width: of the image in pixels; not used.
      pooled: pooled prompt embedding [samples, P].

    Raises: InputError without one, or for another shape.
    """
    shape = samples, config.pooled_projection_dim
    if pooled is None or pooled.shape != shape:
        given = "nothing" if pooled is None else f"shape {pooled.shape}"
        raise InputError(f"pooled: found {given}; expected a text vector of shape {shape}")
    return {"pooled": pooled}


def predictor(apply: Callable, config: Config) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> raw_BHWC; the network takes no attention mask."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return apply(params, x_BHWC, t_B, cond.text, cond.extras["pooled"])

    return call


def features(apply: Callable) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond, blocks=()) -> features [B, N, D], see `Denoiser`."""

    def call(params: Params, x_BHWC, t_B, cond: Cond, blocks=()):
        inputs = x_BHWC, t_B, cond.text, cond.extras["pooled"]
        return apply(params, *inputs, blocks=blocks, method="features")

    return call


def torch_inputs(config: Config, cond: Cond) -> dict[str, Any]:
    """Arguments of SD3Transformer2DModel."""
    return {"pooled_projections": cond.extras["pooled"]}
