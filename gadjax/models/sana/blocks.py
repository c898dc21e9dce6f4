"""Layers of Sana and its autoencoder: linear attention, RMS norm, gated convolutions."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.models import layers
from gadjax.models.module import Keys
from gadjax.types import TextKV

RMS_EPS = 1e-5
ATTENTION_EPS = 1e-15


def relu_linear_attention(q_BNHK: jax.Array, k_BMHK: jax.Array, v_BMHV: jax.Array) -> jax.Array:
    """ReLU linear attention: weights relu(q) . relu(k), normalised to sum 1; linear in N and M.

    Katharopoulos et al., arXiv:2006.16236.

    Args:
      q_BNHK, k_BMHK, v_BMHV: queries, keys and values.

    Returns: [B, N, H, V] in the dtype of the values; computed in at least float32, products too.
      Zeros for a query whose weights are all zero.
    """
    wide = jnp.promote_types(v_BMHV.dtype, jnp.float32)
    einsum = partial(jnp.einsum, precision="highest")
    q, k = jax.nn.relu(q_BNHK.astype(wide)), jax.nn.relu(k_BMHK.astype(wide))
    memory_BHKV = einsum("bmhk,bmhv->bhkv", k, v_BMHV.astype(wide))
    total_BNH = einsum("bnhk,bhk->bnh", q, k.sum(1))
    # Where all weights are zero the numerator is zero too, so any divisor does; only 1 keeps the
    # derivatives of the quotient from overflowing.
    total_BNH = jnp.where(total_BNH > 0, total_BNH, 1) + ATTENTION_EPS
    out_BNHV = einsum("bnhk,bhkv->bnhv", q, memory_BHKV) / total_BNH[..., None]
    return out_BNHV.astype(v_BMHV.dtype)


class RMSNorm(nnx.Module):
    """RMS norm of the last axis: x / rms(x), times a scale, plus a bias if there is one."""

    def __init__(self, features: int, *, use_bias: bool = False):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + RMS_EPS)
        normed = normed * self.scale[...].astype(wide.dtype)
        if self.bias is not None:
            normed = normed + self.bias[...].astype(wide.dtype)
        return normed.astype(x.dtype)


class GLUMBConv(nnx.Module):
    """Gated linear unit with convolutions (Mix-FFN), [B, H, W, C] -> [B, H, W, C], no residual.

    Widens to 2 `hidden` channels, convolves them depthwise 3x3, gates one half by the other,
    narrows back to `channels`, and applies an RMS norm if `use_norm`.
    """

    def __init__(self, channels: int, hidden: int, *, use_norm: bool = False, dtype, rngs: Keys):
        def conv(inputs, outputs, size=1, **options):
            pad = ((size // 2,) * 2,) * 2
            return layers.Conv(
                inputs, outputs, (size, size), padding=pad, dtype=dtype, rngs=rngs, **options
            )

        self.conv_inverted = conv(channels, 2 * hidden)
        self.conv_depth = conv(2 * hidden, 2 * hidden, 3, feature_group_count=2 * hidden)
        self.conv_point = conv(hidden, channels, use_bias=False)
        self.norm = RMSNorm(channels, use_bias=True) if use_norm else None

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        wide_BHWE = self.conv_depth(jax.nn.silu(self.conv_inverted(x_BHWC)))
        value_BHWF, gate_BHWF = jnp.split(wide_BHWE, 2, axis=-1)
        x_BHWC = self.conv_point(value_BHWF * jax.nn.silu(gate_BHWF))
        return x_BHWC if self.norm is None else self.norm(x_BHWC)


class Attention(layers.Attention):
    """Softmax cross-attention, or ReLU linear self-attention if `linear`.

    Args:
      dim: width of the tokens.
      heads, head_dim: number of heads and width of one.
      bias: of the projections to queries, keys and values.
      qk_norm: RMS norm of queries and keys, over all heads at once.
      linear: ReLU linear attention in place of softmax.
      dtype: of the computation.
      rngs: keys of the initialisers.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        bias: bool,
        qk_norm: bool,
        linear: bool,
        dtype,
        rngs: Keys,
    ):
        super().__init__(dim, heads, head_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.norm_q = RMSNorm(heads * head_dim) if qk_norm else None
        self.norm_k = RMSNorm(heads * head_dim) if qk_norm else None
        self.linear = linear

    def queries(self, x_BND: jax.Array) -> jax.Array:
        q = super().queries(x_BND)
        return q if self.norm_q is None else self.norm_q(q)

    def keys_values(self, context_BMC: jax.Array) -> TextKV:
        kv = super().keys_values(context_BMC)
        return kv if self.norm_k is None else kv._replace(k=self.norm_k(kv.k))

    def attend(self, q_BNHK, k_BMHK, v_BMHK, bias) -> jax.Array:
        """Attention output [B, N, H, K]; `bias` is of softmax attention only."""
        if self.linear:
            return relu_linear_attention(q_BNHK, k_BMHK, v_BMHK)
        return super().attend(q_BNHK, k_BMHK, v_BMHK, bias)
