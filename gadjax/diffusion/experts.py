"""Experts by step: a network of the noisier times and one of the others, as one set of parameters.

As base and refiner of SDXL, and the phases of Phased DMD (arXiv 2510.27684).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from gadjax.types import Cond, Params, expand


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["early", "late"],
    meta_fields=["boundary"],
)
@dataclass(frozen=True)
class Experts:
    """Parameters of two networks of one architecture, in the place of a network's parameters.

    Attributes:
      early: of the times above the boundary, which may be experts again.
      late: of the other times; None where they are added later.
      boundary: a time between them.
    """

    early: "Params | Experts"
    late: Params | None
    boundary: float


def by_time(
    apply: Callable[[Params, jax.Array, jax.Array, Cond], jax.Array],
    params: Params | Experts,
    x_BHWC,
    t_B,
    cond: Cond,
):
    """`apply` with the parameters of each sample's expert.

    An expert that none of the samples is for is not evaluated, so that a step of all samples at one
    time costs one evaluation; otherwise each expert that is needed is evaluated on all of them.

    Args:
      apply: (params, x_BHWC, t_B, cond) -> [B, H, W, C].
      params: of one network, or experts.
      x_BHWC, t_B: noisy latents and their timesteps [B].
      cond: conditioning.
    """
    if not isinstance(params, Experts):
        return apply(params, x_BHWC, t_B, cond)
    early_B = t_B > params.boundary

    def if_needed(chosen_B, params):
        def evaluate(x):
            return by_time(apply, params, x, t_B, cond).astype(x.dtype)

        return jax.lax.cond(jnp.any(chosen_B), evaluate, jnp.zeros_like, x_BHWC)

    early, late = if_needed(early_B, params.early), if_needed(~early_B, params.late)
    return jnp.where(expand(early_B, x_BHWC), early, late)
