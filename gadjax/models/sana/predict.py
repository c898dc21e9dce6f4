"""How a Denoiser calls this family: what it is told, and which of its channels are the answer.

Times and guidance scales are a scheduler's and a user's own: the network scales them as diffusers'
pipelines do. To Sprint, `cond.extras` is {"guidance": [B] float32}, put there by the caller, and
x and t are what its pipeline passes to the transformer (t in [0, 1]), not what its scheduler has.
"""

from collections.abc import Callable

import jax

from gadjax.models.sana.net import Config
from gadjax.types import Cond, Params

TEXT_KV = "text_kv"  # the method that makes of a text what x and t do not change


def extras(config: Config, samples: int, height: int, width: int, pooled=None) -> None:
    """Nothing: neither size nor pooled text is told. A guidance scale is the caller's to choose."""
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
    """(params, x_BHWC, t_B, cond) -> [B, N, D], what the network makes of them half-way."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return apply(params, x_BHWC, t_B, cond.text, cond.mask, _guidance(cond), method="features")

    return call
