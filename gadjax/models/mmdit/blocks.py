"""The blocks of SD3's transformer: two streams with weights of their own that attend together."""

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.models import layers
from gadjax.models.mmdit.config import Config
from gadjax.models.module import Keys
from gadjax.ops.attention import attention
from gadjax.parallel.placement import gather_positions

EPS = 1e-6  # of every norm


class Modulation(nnx.Module):
    """What a norm is followed by, read from the time and text vector: [B, 1, D] each."""

    def __init__(self, dim: int, count: int, *, dtype, rngs: Keys):
        self.linear = nnx.Linear(dim, count * dim, dtype=dtype, rngs=rngs)
        self.count = count

    def __call__(self, emb_B1D: jax.Array) -> list[jax.Array]:
        return jnp.split(self.linear(emb_B1D), self.count, axis=-1)


def modulate(x_BND: jax.Array, shift_B1D: jax.Array, scale_B1D: jax.Array) -> jax.Array:
    """Scale and shift around one."""
    return x_BND * (1 + scale_B1D) + shift_B1D


class Stream(nnx.Module):
    """One stream's side of an attention: its heads, and the way back from them."""

    def __init__(self, c: Config, *, back: bool = True, dtype, rngs: Keys):
        def linear():
            return nnx.Linear(c.dim, c.dim, dtype=dtype, rngs=rngs)

        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        if back:
            self.to_out = linear()
        if c.qk_norm:
            self.norm_q, self.norm_k = (
                nnx.RMSNorm(c.attention_head_dim, epsilon=EPS, dtype=dtype, rngs=rngs)
                for _ in range(2)
            )
        self.heads, self.normed = c.num_attention_heads, bool(c.qk_norm)

    def __call__(self, x_BND: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each [B, N, H, K]."""
        q, k, v = (
            to(x_BND).reshape(*x_BND.shape[:2], self.heads, -1)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        return (self.norm_q(q), self.norm_k(k), v) if self.normed else (q, k, v)

    def back(self, x_BNHK: jax.Array) -> jax.Array:
        return self.to_out(x_BNHK.reshape(*x_BNHK.shape[:2], -1))


class Block(nnx.Module):
    """Joint attention and a feed-forward for each stream.

    dual: the picture also attends to itself alone. last: the text is read and not written.
    """

    def __init__(self, c: Config, *, dual: bool, last: bool = False, dtype, rngs: Keys):
        def ff():
            return layers.Mlp(c.dim, 4 * c.dim, c.dim, layers.gelu_tanh, dtype=dtype, rngs=rngs)

        def modulation(count):
            return Modulation(c.dim, count, dtype=dtype, rngs=rngs)

        self.norm1, self.norm1_context = modulation(9 if dual else 6), modulation(2 if last else 6)
        self.attn = Stream(c, dtype=dtype, rngs=rngs)
        self.attn_context = Stream(c, back=not last, dtype=dtype, rngs=rngs)
        if dual:
            self.attn2 = Stream(c, dtype=dtype, rngs=rngs)
        self.ff = ff()
        if not last:
            self.ff_context = ff()
        self.dual, self.last = dual, last

    def __call__(
        self, x_BND: jax.Array, text_BLD: jax.Array, emb_B1D: jax.Array, again: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Both streams after the block; the text as it came in where the block is the last.

        again: whether reverse mode computes all of it again.
        """
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *more = self.norm1(emb_B1D)
        if self.last:  # the other order, as in diffusers' files
            scale_text, shift_text = self.norm1_context(emb_B1D)
        else:
            shift_text, scale_text, *rest = self.norm1_context(emb_B1D)
        normed = layers.layer_norm(x_BND, EPS)
        normed_text = layers.layer_norm(text_BLD, EPS)
        q, *own = self.attn(modulate(normed, shift, scale))
        q_text, *others = self.attn_context(modulate(normed_text, shift_text, scale_text))
        # Each stream's queries by themselves: together no mesh would divide their positions. Keys
        # come to every device before they are joined, or all would change places.
        k, v = (
            jnp.concatenate(gather_positions(pair), axis=1)
            for pair in zip(own, others, strict=True)
        )
        x_BND = x_BND + gate * self.attn.back(attention(q, k, v))
        if self.dual:
            shift, scale, gate = more
            alone = attention(*self.attn2(modulate(normed, shift, scale)))
            x_BND = x_BND + gate * self.attn2.back(alone)
        normed = modulate(layers.layer_norm(x_BND, EPS), shift_ff, scale_ff)
        x_BND = self.ff.added(x_BND, gate_ff, normed, again)
        if self.last:
            return x_BND, text_BLD
        gate, shift_ff, scale_ff, gate_ff = rest
        text_BLD = text_BLD + gate * self.attn_context.back(attention(q_text, k, v))
        normed = modulate(layers.layer_norm(text_BLD, EPS), shift_ff, scale_ff)
        return x_BND, self.ff_context.added(text_BLD, gate_ff, normed, again)
