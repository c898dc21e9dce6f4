"""FLUX.2-klein's blocks, none of which has a bias or a modulation of its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.models import layers
from gadjax.models.flux2.config import Config
from gadjax.models.mmdit.blocks import join_streams, modulate
from gadjax.models.module import Keys
from gadjax.models.rotary import rotate_pairs
from gadjax.ops.attention import attention


def linear(inputs: int, outputs: int, dtype, rngs: Keys) -> nnx.Linear:
    """Linear layer without a bias."""
    return layers.Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)


class Modulation(nnx.Module):
    """Shifts, scales and gates: `count` arrays [B, 1, D] from the embedding of the time."""

    def __init__(self, dim: int, count: int, *, dtype, rngs: Keys):
        self.linear = linear(dim, count * dim, dtype, rngs)
        self.count = count

    def __call__(self, emb_B1D: jax.Array) -> list[jax.Array]:
        return jnp.split(self.linear(emb_B1D), self.count, axis=-1)


class Modulations(NamedTuple):
    """Arrays [B, 1, D] that modulate all blocks: both streams of double ones, and single ones.

    Each is shift, scale and gate, of the attention and then of a double block's feed-forward.
    """

    image: list[jax.Array]
    text: list[jax.Array]
    single: list[jax.Array]


class Rotations(NamedTuple):
    """Rotations [2, N, K / 2] of the image's and of the text's queries and keys."""

    image: jax.Array
    text: jax.Array


@layers.recomputed
def swiglu(x_BNF: jax.Array) -> jax.Array:
    """silu(a) * b of the two halves of the channels: [B, N, 2 F] -> [B, N, F]."""
    gate, value = jnp.split(x_BNF, 2, axis=-1)
    return jax.nn.silu(gate) * value


class FeedForward(nnx.Module):
    """Gated feed-forward, whose first layer is one product for both halves."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        self.linear_in = linear(c.dim, 2 * c.hidden_dim, dtype, rngs)
        self.linear_out = linear(c.hidden_dim, c.dim, dtype, rngs)

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        return self.linear_out(swiglu(self.linear_in(x_BND)))


class _Heads(nnx.Module):
    """Norms and rotation of the queries and keys of every head."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        self.norm_q, self.norm_k = (
            nnx.RMSNorm(c.attention_head_dim, epsilon=c.eps, dtype=dtype, rngs=rngs)
            for _ in range(2)
        )
        self.heads, self.eps = c.num_attention_heads, c.eps

    def by_head(self, projected, rotation: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [B, N, H, K] of their projections, each [B, N, D]."""
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in projected)
        q, k = (rotate_pairs(a, rotation) for a in (self.norm_q(q), self.norm_k(k)))
        return q, k, v


class Stream(_Heads):
    """One stream's projections of a double block's attention: to queries, keys, values, and out."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        super().__init__(c, dtype=dtype, rngs=rngs)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            linear(c.dim, c.dim, dtype, rngs) for _ in range(4)
        )

    def __call__(self, x_BND: jax.Array, rotation: jax.Array):
        """Queries, keys and values, each [B, N, H, K]."""
        projections = self.to_q, self.to_k, self.to_v
        return self.by_head([project(x_BND) for project in projections], rotation)

    def add(self, x_BND, attended_BNHK, ff: FeedForward, modulation) -> jax.Array:
        """The stream with its attention's and then its feed-forward's output.

        Args:
          x_BND: the stream.
          attended_BNHK: output of the attention.
          ff: of this stream.
          modulation: gate of the attention; shift, scale and gate of the feed-forward.
        """
        gate, shift_ff, scale_ff, gate_ff = modulation
        attended_BND = attended_BNHK.reshape(*attended_BNHK.shape[:2], -1)
        x_BND = x_BND + gate * self.to_out(attended_BND)
        normed = modulate(layers.layer_norm(x_BND, self.eps), shift_ff, scale_ff)
        return x_BND + gate_ff * ff(normed)


class DoubleBlock(nnx.Module):
    """Joint attention of image and text, with weights and a feed-forward of each stream's own."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        options = {"dtype": dtype, "rngs": rngs}
        self.attn, self.attn_context = (Stream(c, **options) for _ in range(2))
        self.ff, self.ff_context = (FeedForward(c, **options) for _ in range(2))
        self.eps = c.eps

    def __call__(self, x_BND, text_BLD, modulations: Modulations, rotations: Rotations) -> tuple:
        """Both streams after the block."""
        shift, scale, *rest = modulations.image
        shift_text, scale_text, *rest_text = modulations.text
        normed = modulate(layers.layer_norm(x_BND, self.eps), shift, scale)
        normed_text = modulate(layers.layer_norm(text_BLD, self.eps), shift_text, scale_text)
        q, *image_kv = self.attn(normed, rotations.image)
        q_text, *text_kv = self.attn_context(normed_text, rotations.text)
        # Queries stay apart per stream: no mesh would divide the joined positions.
        k, v = join_streams(image_kv, text_kv)
        return (
            self.attn.add(x_BND, attention(q, k, v), self.ff, rest),
            self.attn_context.add(text_BLD, attention(q_text, k, v), self.ff_context, rest_text),
        )


class ParallelAttention(_Heads):
    """Attention and feed-forward side by side, with one product into and one out of both."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        super().__init__(c, dtype=dtype, rngs=rngs)
        self.to_qkv_mlp_proj = linear(c.dim, 3 * c.dim + 2 * c.hidden_dim, dtype, rngs)
        self.to_out = linear(c.dim + c.hidden_dim, c.dim, dtype, rngs)
        self.ends = c.dim, 2 * c.dim, 3 * c.dim

    def __call__(self, x_BND: jax.Array, rotation: jax.Array) -> tuple:
        """Queries, keys and values [B, N, H, K], and the feed-forward's hidden layer."""
        *projected, hidden = jnp.split(self.to_qkv_mlp_proj(x_BND), self.ends, axis=-1)
        return *self.by_head(projected, rotation), swiglu(hidden)

    def project_out(self, attended_BNHK: jax.Array, hidden_BNF: jax.Array) -> jax.Array:
        """Output [B, N, D] of the attention and the feed-forward."""
        attended_BND = attended_BNHK.reshape(*attended_BNHK.shape[:2], -1)
        return self.to_out(jnp.concatenate([attended_BND, hidden_BNF], axis=-1))


class SingleBlock(nnx.Module):
    """Attention and feed-forward side by side, of both streams with the same parameters."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        self.attn = ParallelAttention(c, dtype=dtype, rngs=rngs)
        self.eps = c.eps

    def __call__(self, x_BND, text_BLD, modulations: Modulations, rotations: Rotations) -> tuple:
        """Both streams after the block."""
        shift, scale, gate = modulations.single
        normed, normed_text = (
            modulate(layers.layer_norm(a, self.eps), shift, scale) for a in (x_BND, text_BLD)
        )
        q, *image_kv, hidden = self.attn(normed, rotations.image)
        q_text, *text_kv, hidden_text = self.attn(normed_text, rotations.text)
        k, v = join_streams(image_kv, text_kv)
        return (
            x_BND + gate * self.attn.project_out(attention(q, k, v), hidden),
            text_BLD + gate * self.attn.project_out(attention(q_text, k, v), hidden_text),
        )
