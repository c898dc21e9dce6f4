"""MMDiT blocks: joint attention of two streams, image and text, with separate weights."""

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.models import layers
from gadjax.models.mmdit.config import Config
from gadjax.models.module import Keys
from gadjax.models.rotary import rotate_pairs
from gadjax.ops.attention import attention
from gadjax.parallel.placement import gather_positions

EPS = 1e-6  # of every norm


class Modulation(nnx.Module):
    """Adaptive norm's modulation: `count` arrays [B, 1, D] from the time and pooled text vector."""

    def __init__(self, dim: int, count: int, *, dtype, rngs: Keys):
        self.linear = layers.Linear(dim, count * dim, dtype=dtype, rngs=rngs)
        self.count = count

    def __call__(self, emb_B1D: jax.Array) -> list[jax.Array]:
        return jnp.split(self.linear(emb_B1D), self.count, axis=-1)


def modulate(x_BND: jax.Array, shift_B1D: jax.Array, scale_B1D: jax.Array) -> jax.Array:
    """Modulated x: x * (1 + scale) + shift."""
    return x_BND * (1 + scale_B1D) + shift_B1D


class Stream(nnx.Module):
    """One stream's projections of an attention: to queries, keys and values, and out.

    has_out: whether the stream reads the attention's output; in the last block the text does not.
    """

    def __init__(self, c: Config, *, has_out: bool = True, dtype, rngs: Keys):
        def linear():
            return layers.Linear(c.dim, c.dim, dtype=dtype, rngs=rngs)

        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        if has_out:
            self.to_out = linear()
        if c.qk_norm:
            self.norm_q, self.norm_k = (
                nnx.RMSNorm(c.attention_head_dim, epsilon=EPS, dtype=dtype, rngs=rngs)
                for _ in range(2)
            )
        self.heads, self.normed = c.num_attention_heads, bool(c.qk_norm)

    def __call__(
        self, x_BND: jax.Array, rotation: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each [B, N, H, K].

        rotation: of queries and keys, by the tokens' positions; None: not rotated.
        """
        q, k, v = (
            project(x_BND).reshape(*x_BND.shape[:2], self.heads, -1)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        q, k = (self.norm_q(q), self.norm_k(k)) if self.normed else (q, k)
        return (q, k, v) if rotation is None else (*(rotate_pairs(a, rotation) for a in (q, k)), v)

    def project_out(self, x_BNHK: jax.Array) -> jax.Array:
        """Output projection of the heads, [B, N, H, K] -> [B, N, D]."""
        return self.to_out(x_BNHK.reshape(*x_BNHK.shape[:2], -1))


def join_streams(image, text) -> list[jax.Array]:
    """Keys and values of both streams as one sequence; each pair [B, N, H, K] and [B, L, H, K]."""
    # Keys are gathered before they are joined, or all of them would move between devices.
    pairs = zip(image, text, strict=True)
    return [jnp.concatenate(gather_positions(pair), axis=1) for pair in pairs]


class Block(nnx.Module):
    """Joint attention of image and text, and a feed-forward for each stream.

    Args:
      c: the network's options.
      dual: a second attention of the image's tokens to themselves alone (SD3.5).
      last: the text is attended to and not updated.
      dtype: of the computation.
      rngs: keys of the initialisers.
    """

    def __init__(self, c: Config, *, dual: bool, last: bool = False, dtype, rngs: Keys):
        def ff():
            return layers.Mlp(c.dim, 4 * c.dim, c.dim, layers.gelu_tanh, dtype=dtype, rngs=rngs)

        def modulation(count):
            return Modulation(c.dim, count, dtype=dtype, rngs=rngs)

        self.norm1, self.norm1_context = modulation(9 if dual else 6), modulation(2 if last else 6)
        self.attn = Stream(c, dtype=dtype, rngs=rngs)
        self.attn_context = Stream(c, has_out=not last, dtype=dtype, rngs=rngs)
        if dual:
            self.attn2 = Stream(c, dtype=dtype, rngs=rngs)
        self.ff = ff()
        if not last:
            self.ff_context = ff()
        self.dual, self.last = dual, last

    def __call__(
        self,
        x_BND: jax.Array,
        text_BLD: jax.Array,
        emb_B1D: jax.Array,
        remat: bool,
        rotation: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Both streams after the block; the last block returns the text unchanged.

        Args:
          x_BND: tokens of the image.
          text_BLD: tokens of the text.
          emb_B1D: embedding of the time and the pooled text, after its activation.
          remat: whether reverse mode recomputes the block entirely; see `Mlp.gated_residual`.
          rotation: of the image's queries and keys, where the family has rotary positions.
        """
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *dual = self.norm1(emb_B1D)
        if self.last:  # the other order, as in diffusers' files
            scale_text, shift_text = self.norm1_context(emb_B1D)
        else:
            shift_text, scale_text, *text_modulation = self.norm1_context(emb_B1D)
        normed = layers.layer_norm(x_BND, EPS)
        normed_text = layers.layer_norm(text_BLD, EPS)
        q, *image_kv = self.attn(modulate(normed, shift, scale), rotation)
        q_text, *text_kv = self.attn_context(modulate(normed_text, shift_text, scale_text))
        # Queries stay apart per stream: no mesh would divide the joined positions.
        k, v = join_streams(image_kv, text_kv)
        x_BND = x_BND + gate * self.attn.project_out(attention(q, k, v))
        if self.dual:
            shift, scale, gate = dual
            out = attention(*self.attn2(modulate(normed, shift, scale)))
            x_BND = x_BND + gate * self.attn2.project_out(out)
        normed = modulate(layers.layer_norm(x_BND, EPS), shift_ff, scale_ff)
        x_BND = self.ff.gated_residual(x_BND, gate_ff, normed, remat)
        if self.last:
            return x_BND, text_BLD
        gate, shift_ff, scale_ff, gate_ff = text_modulation
        text_BLD = text_BLD + gate * self.attn_context.project_out(attention(q_text, k, v))
        normed = modulate(layers.layer_norm(text_BLD, EPS), shift_ff, scale_ff)
        return x_BND, self.ff_context.gated_residual(text_BLD, gate_ff, normed, remat)
