"""Adapter from `Denoiser` to Z-Image: conditioning inputs."""

from collections.abc import Callable
from typing import Any

import jax

from gadjax.models.zimage.config import STEPS, Config
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


def torch_call(network: Any, config: Config, x_BHWC: Any, t_B: Any, cond: Cond) -> Any:
    """Velocity [B, H, W, C] of ZImageTransformer2DModel, which takes lists of samples, counts time
    from noise on and has the other sign.

    Args:
      network: of diffusers.
      config: the network's options.
      x_BHWC, t_B, cond: inputs of the predictor, as torch's tensors.
    """
    import torch

    captions = [text[:length] for text, length in zip(cond.text, cond.mask.sum(1), strict=True)]
    latents = list(x_BHWC.permute(0, 3, 1, 2)[:, :, None])
    samples = network(latents, (STEPS - t_B) / STEPS, captions).sample
    return -torch.stack(samples)[:, :, 0].permute(0, 2, 3, 1)
