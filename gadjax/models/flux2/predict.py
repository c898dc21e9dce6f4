"""Adapter from `Denoiser` to FLUX.2-klein, and how diffusers' class is called."""

from collections.abc import Callable
from typing import Any

import jax

from gadjax.models.flux2.config import Config
from gadjax.types import Cond, Params


def predictor(apply: Callable, config: Config) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> raw_BHWC; the network takes no attention mask."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return apply(params, x_BHWC, t_B, cond.text)

    return call


def features(apply: Callable) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond, blocks=()) -> features [B, N, D], see `Denoiser`."""

    def call(params: Params, x_BHWC, t_B, cond: Cond, blocks=()):
        return apply(params, x_BHWC, t_B, cond.text, blocks=blocks, method="features")

    return call


def torch_call(network: Any, config: Config, x_BHWC: Any, t_B: Any, cond: Cond) -> Any:
    """Raw output [B, H, W, C] of Flux2Transformer2DModel, which takes tokens with their positions.

    Args:
      network: of diffusers.
      config: the network's options.
      x_BHWC, t_B, cond: inputs of the predictor, as torch's tensors.
    """
    b, height, width, c = x_BHWC.shape
    places = [(0, row, column, 0) for row in range(height) for column in range(width)]
    out = network(
        hidden_states=x_BHWC.reshape(b, height * width, c),
        encoder_hidden_states=cond.text,
        timestep=t_B / 1000,  # the class multiplies by it
        img_ids=x_BHWC.new_tensor(places),
        txt_ids=x_BHWC.new_tensor([(0, 0, 0, i) for i in range(cond.text.shape[1])]),
    ).sample
    return out.reshape(x_BHWC.shape)
