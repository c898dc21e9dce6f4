"""Z-Image's block: attention and a gated feed-forward, each between two norms."""

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.models import layers
from gadjax.models.module import Keys
from gadjax.models.rotary import rotate_pairs
from gadjax.models.zimage.config import Config
from gadjax.ops.attention import attention

QK_EPS = 1e-5  # norm_eps is not that of queries and keys


def _norm(width: int, eps: float, dtype, rngs: Keys) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=eps, dtype=dtype, rngs=rngs)


def _linear(inputs: int, outputs: int, dtype, rngs: Keys) -> nnx.Linear:
    return layers.Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Self-attention with a norm and a rotation of every head's queries and keys.

    Consecutive queries share a head of keys and values where there are fewer of these.
    """

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        width = c.dim // c.n_heads
        self.to_q, self.to_out = (_linear(c.dim, c.dim, dtype, rngs) for _ in range(2))
        self.to_k, self.to_v = (_linear(c.dim, c.kv_heads * width, dtype, rngs) for _ in range(2))
        self.width, self.shared = width, c.n_heads // c.kv_heads
        self.norm_q, self.norm_k = (_norm(width, QK_EPS, dtype, rngs) for _ in range(2))

    def __call__(self, x_BND: jax.Array, rotation: jax.Array, bias: jax.Array | None) -> jax.Array:
        q, k, v = (
            project(x_BND).reshape(*x_BND.shape[:2], -1, self.width)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        q, k = (rotate_pairs(x, rotation) for x in (self.norm_q(q), self.norm_k(k)))
        k, v = (jnp.repeat(x, self.shared, axis=2) if self.shared > 1 else x for x in (k, v))
        return self.to_out(attention(q, k, v, bias).reshape(x_BND.shape))


class FeedForward(nnx.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        self.w1, self.w3 = (_linear(c.dim, c.hidden_dim, dtype, rngs) for _ in range(2))
        self.w2 = _linear(c.hidden_dim, c.dim, dtype, rngs)

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        return self.w2(jax.nn.silu(self.w1(x_BND)) * self.w3(x_BND))


class Block(nnx.Module):
    """Transformer block, with or without scales and gates that the time embedding gives.

    Args:
      c: the network's options.
      modulated: whether the block gets the time embedding; the caption's does not.
      dtype: of the computation.
      rngs: keys of the initialisers.
    """

    def __init__(self, c: Config, *, modulated: bool = True, dtype, rngs: Keys):
        self.attn = Attention(c, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(c, dtype=dtype, rngs=rngs)
        self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2 = (
            _norm(c.dim, c.norm_eps, dtype, rngs) for _ in range(4)
        )
        if modulated:
            self.adaLN_modulation = layers.Linear(c.time_dim, 4 * c.dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BND: jax.Array,
        rotation: jax.Array,
        bias: jax.Array | None,
        time_B1T: jax.Array | None = None,
    ) -> jax.Array:
        """Tokens [B, N, D] after the block.

        Args:
          x_BND: tokens.
          rotation: of their positions, [2, B or 1, N, K / 2].
          bias: of the attention's logits; None for none.
          time_B1T: what the scales and gates are projected from, where the block is modulated.
        """
        if time_B1T is None:
            scale, gate, scale_ff, gate_ff = 1, 1, 1, 1
        else:
            parts = jnp.split(self.adaLN_modulation(time_B1T), 4, axis=-1)
            scale, gate, scale_ff, gate_ff = (
                f(part) for f, part in zip((_plus_one, jnp.tanh) * 2, parts, strict=True)
            )
        out = self.attn(self.attention_norm1(x_BND) * scale, rotation, bias)
        x_BND = x_BND + gate * self.attention_norm2(out)
        out = self.ff(self.ffn_norm1(x_BND) * scale_ff)
        return x_BND + gate_ff * self.ffn_norm2(out)


def _plus_one(x: jax.Array) -> jax.Array:
    return 1 + x
