"""Shared types. Arrays are NHWC; B batch, H W C latent, L text tokens, D width."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = dict[str, Any]
PyTree = Any  # nested containers of arrays
Metrics = dict[str, jax.Array]


class NegativeKV(NamedTuple):
    """KV cache of a negative prompt whose attention is subtracted (NASA).

    Args:
      k, v: as in `TextKV`.
      bias: of the logits [B, 1, 1, M], for attention that has one; stacked as k and v.
      scale: factor of the subtracted output, a scalar; stacked likewise.
    """

    k: jax.Array
    v: jax.Array
    bias: jax.Array
    scale: jax.Array


class TextKV(NamedTuple):
    """Cross-attention KV cache of a prompt: [B, M, heads * K] of one layer, or [layers, B, M,
    heads * K] of a stack of blocks; and that of a negative prompt, where its attention is
    subtracted."""

    k: jax.Array
    v: jax.Array
    negative: NegativeKV | None = None


class Cond(NamedTuple):
    """Conditioning of a batch.

    Args:
      text: prompt embeddings [B, L, D], or their cross-attention KV cache (`Denoiser.cache_text`).
      mask: attention mask [B, L] (1 = attend).
      extras: family-specific inputs (pooled embedding, micro-conditioning, guidance).
    """

    text: Any
    mask: jax.Array
    extras: Any = None

    def map(self, f: Callable[..., Any], *others: "Cond") -> "Cond":
        """Map f over all arrays with the batch axis first, as jax.tree.map does over several
        trees."""

        def apply(x, *rest):
            return jax.tree.map(jax.vmap(f), x, *rest) if isinstance(x, TextKV) else f(x, *rest)

        return jax.tree.map(apply, self, *others, is_leaf=lambda x: isinstance(x, TextKV))


class Prediction(NamedTuple):
    """Network output as clean latents x0_BHWC and noise eps_BHWC, whatever its parameterization."""

    x0: jax.Array
    eps: jax.Array


class Batch(NamedTuple):
    """Samples of one training step. All randomness of sample i comes from key[i] alone, so that
    neither the mesh, the number of processes nor the microbatch changes what is drawn.

    Args:
      cond, null: conditioning of the prompts and of the negative prompt.
      noise: initial noise z [B, H, W, C].
      key: PRNG keys [B].
      stratum: int32 [B], consecutive numbers from an even one on, which stratify the draws of
        few-step indices evenly over the grid.
      x0: clean latents [B, H, W, C] where the data has images, else None.
      override, label: conditioning of the prompts as teachers read them, and the number int32 [B]
        of a prompt's version, where the data has two of each (`gadjax.data.versions`).
    """

    cond: Cond
    null: Cond
    noise: jax.Array
    key: jax.Array
    stratum: jax.Array
    x0: jax.Array | None = None
    override: Cond | None = None
    label: jax.Array | None = None


def expand(a_B, x_BHWC):
    """Append axes to a_B until it broadcasts against x_BHWC; scalars are returned as they are."""
    return a_B.reshape(a_B.shape + (1,) * (x_BHWC.ndim - a_B.ndim)) if jnp.ndim(a_B) else a_B
