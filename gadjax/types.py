"""The nouns that every part shares. Arrays are NHWC; B batch, H W C latent, L text, D width."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = dict[str, Any]
PyTree = Any  # containers in containers, of arrays
Metrics = dict[str, jax.Array]


class TextKV(NamedTuple):
    """A text's keys and values in one layer [B, M, heads * K], or in a stack of them, the layers
    first, as blocks are run."""

    k: jax.Array
    v: jax.Array


class Cond(NamedTuple):
    """What a network is told beside x and t: text_BLD, mask_BL (1 = read), the family's extras.

    The text may also be what a network made of it for all its layers (`Denoiser.reading`).
    """

    text: Any
    mask: jax.Array
    extras: Any = None

    def map(self, f: Callable[..., Any], *others: "Cond") -> "Cond":
        """f of every array, samples first, as jax.tree.map calls it."""

        def of(x, *rest):
            return jax.tree.map(jax.vmap(f), x, *rest) if isinstance(x, TextKV) else f(x, *rest)

        return jax.tree.map(of, self, *others, is_leaf=lambda x: isinstance(x, TextKV))


class Prediction(NamedTuple):
    """A network's answer in the two spaces everything is written in: x0_BHWC and eps_BHWC."""

    x0: jax.Array
    eps: jax.Array


class Batch(NamedTuple):
    """One step's samples. All randomness of sample i comes from key_B[i] alone, so that neither
    the mesh, the number of processes nor the microbatch changes what is drawn.

    noise_BHWC is the initial noise z; stratum_B (int32), numbers in a row from an even one on,
    spreads few-step draws evenly over the grid; x0_BHWC are clean latents where the data has
    pictures.
    """

    cond: Cond
    null: Cond
    noise: jax.Array
    key: jax.Array
    stratum: jax.Array
    x0: jax.Array | None = None


def expand(a_B, x_BHWC):
    """a_B with the trailing axes that let it multiply x_BHWC; scalars as they are."""
    return a_B.reshape(a_B.shape + (1,) * (x_BHWC.ndim - a_B.ndim)) if jnp.ndim(a_B) else a_B
