"""How a Denoiser calls this family: what it is told, and what its answer is."""

from collections.abc import Callable

import jax

from gadjax.errors import InputError
from gadjax.models.mmdit.config import Config
from gadjax.types import Cond, Params


def extras(
    config: Config, samples: int, height: int, width: int, pooled: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The pooled text vector; the picture's size is not told. Raises: InputError without one."""
    shape = samples, config.pooled_projection_dim
    if pooled is None or pooled.shape != shape:
        found = "nothing" if pooled is None else f"shape {pooled.shape}"
        raise InputError(f"pooled: found {found}; expected a text vector of shape {shape}")
    return {"pooled": pooled}


def predictor(apply: Callable, config: Config) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> raw_BHWC; the network has no mask of the text."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return apply(params, x_BHWC, t_B, cond.text, cond.extras["pooled"])

    return call


def features(apply: Callable) -> Callable[..., jax.Array]:
    """(params, x_BHWC, t_B, cond) -> [B, N, D], what the network makes of them half-way."""

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return apply(params, x_BHWC, t_B, cond.text, cond.extras["pooled"], method="features")

    return call
