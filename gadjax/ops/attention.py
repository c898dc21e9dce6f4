"""Softmax attention: the one place where every network computes it."""

import jax
import jax.numpy as jnp


def attention(
    q_BNHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Softmax(q k / sqrt(K) + bias) v, with logits and softmax in at least float32.

    Args:
      q_BNHK: queries, N positions of H heads of K channels.
      k_BMHK, v_BMHK: keys and values, M positions.
      bias: added to the logits; broadcasts to [B, H, N, M].

    Returns: [B, N, H, K] in the dtype of the values. Differentiable in both modes, repeatedly.
    """
    wide = jnp.promote_types(q_BNHK.dtype, jnp.float32)
    logits_BHNM = jnp.einsum("bnhk,bmhk->bhnm", q_BNHK, k_BMHK, preferred_element_type=wide)
    logits_BHNM = logits_BHNM * q_BNHK.shape[-1] ** -0.5
    if bias is not None:
        logits_BHNM = logits_BHNM + bias.astype(wide)
    weights_BHNM = jax.nn.softmax(logits_BHNM, axis=-1).astype(v_BMHK.dtype)
    return jnp.einsum("bhnm,bmhk->bnhk", weights_BHNM, v_BMHK)
