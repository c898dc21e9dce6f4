"""Adapter from `Denoiser` to FLUX.1: conditioning inputs, and how diffusers' class is called."""

from collections.abc import Callable
from typing import Any

import jax

from gadjax.models.flux.config import PATCH, Config
from gadjax.types import Cond, Params


def _inputs(cond: Cond) -> tuple:
    return cond.text, cond.extras["pooled"], cond.extras.get("guidance")


def predictor(apply: Callable, config: Config) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> raw_BHWC; the network takes no attention mask."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return apply(params, x_BHWC, t_B, *_inputs(cond))

    return call


def features(apply: Callable) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond, blocks=()) -> features [B, N, D], see `Denoiser`."""

    def call(params: Params, x_BHWC, t_B, cond: Cond, blocks=()):
        inputs = x_BHWC, t_B, *_inputs(cond)
        return apply(params, *inputs, blocks=blocks, method="features")

    return call


def torch_call(network: Any, config: Config, x_BHWC: Any, t_B: Any, cond: Cond) -> Any:
    """Raw output [B, H, W, C] of FluxTransformer2DModel, on latents that are packed for it.

    Args:
      network: of diffusers.
      config: the network's options.
      x_BHWC, t_B, cond: inputs of the predictor, as torch's tensors.
    """
    b, height, width, c = x_BHWC.shape
    h, w = height // PATCH, width // PATCH
    packed = (
        x_BHWC.reshape(b, h, PATCH, w, PATCH, c).permute(0, 1, 3, 5, 2, 4).reshape(b, h * w, -1)
    )
    places = [(0, row, column) for row in range(h) for column in range(w)]
    text, pooled, guidance = _inputs(cond)
    out = network(
        hidden_states=packed,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=t_B / 1000,  # the class multiplies by it
        img_ids=x_BHWC.new_tensor(places),
        txt_ids=x_BHWC.new_zeros(text.shape[1], 3),
        guidance=guidance,
    ).sample
    return out.reshape(b, h, w, c, PATCH, PATCH).permute(0, 1, 4, 2, 5, 3).reshape(x_BHWC.shape)
