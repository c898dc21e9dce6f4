"""Layers that several backbones share: attention, MLP, patch and timestep embeddings.

Parameter names follow diffusers where a module has any.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gadjax.errors import InputError
from gadjax.models.module import Keys
from gadjax.ops import linear as ops
from gadjax.ops.attention import attention
from gadjax.parallel.placement import (
    batch_shards,
    constrain_batch,
    current_placement,
    sequence_shards,
)
from gadjax.types import TextKV

# Elements of an MLP's hidden layer that a device computes at once in training, unless that took
# more than MAX_CHUNKS, since every chunk reads and writes the sum.
MAX_CHUNK_ELEMENTS = 2**23
MAX_CHUNKS = 4
# Layers whose kernel may be adapted: their arguments, parameters and results are nnx's.
Linear = partial(nnx.Linear, promote_dtype=ops.promote_dtype, dot_general=ops.dot_general)
Conv = partial(
    nnx.Conv, promote_dtype=ops.promote_dtype, conv_general_dilated=ops.conv_general_dilated
)
# Finite, so that a prompt without any token attends evenly instead of giving NaN.
MASKED_LOGIT = -10_000.0


def numbered(modules: Iterable[nnx.Module]) -> nnx.Dict:
    """Dict of modules with the keys "0", "1", ... in order, as diffusers' files number them."""
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})


def modulation_table(rngs: Keys, rows: int, dim: int) -> nnx.Param:
    """Learned modulation [rows, dim], which adaptive norms add to the timestep's projections."""
    return nnx.Param(jax.random.normal(rngs.params(), (rows, dim)) / dim**0.5)


# Elementwise functions are cheaper to recompute in reverse than their intermediates are to store.
recomputed = partial(jax.checkpoint, prevent_cse=False)


@recomputed
def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU in its tanh approximation ("gelu-approximate" in diffusers)."""
    return jax.nn.gelu(x, approximate=True)


@partial(recomputed, static_argnums=1)
def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """Layer norm of the last axis, without scale or bias; statistics in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def mask_bias(mask_BM: jax.Array) -> jax.Array:
    """Attention mask (1 = attend, 0 = ignore) -> float32 bias [B, 1, 1, M] on the logits."""
    return ((1.0 - mask_BM.astype(jnp.float32)) * MASKED_LOGIT)[:, None, None, :]


def timestep_sinusoid(t_B: jax.Array, channels: int) -> jax.Array:
    """Sinusoidal embedding [cos | sin] of possibly fractional timesteps: float32 [B, channels]."""
    half = channels // 2
    # Rounded where diffusers rounds: at t near 1000 an ulp of a frequency shows in its sine.
    exponents = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t_B.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _sincos_axis(count: int, channels: int, base: int, scale: float) -> np.ndarray:
    """Sinusoids [sin | cos] of `count` positions over `base` / `scale` units: [count, channels]."""
    positions = np.arange(count, dtype=np.float64) * (base / count) / scale
    half = channels // 2
    angles = positions[:, None] * 10_000.0 ** -(np.arange(half, dtype=np.float64) / half)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def sincos_positions(
    height: int, width: int, channels: int, base: int, scale: float, dtype=jnp.float32
) -> jax.Array:
    """Sinusoidal position embeddings of a grid of patches, row by row.

    The first half of the channels encodes the column, the second the row.

    Args:
      height, width: of the grid, in patches; any aspect ratio.
      channels: a multiple of 4.
      base: side of the grid at the training size, onto which every other size is interpolated.
      scale: interpolation scale, which compresses positions.
      dtype: of the table.

    Returns: [height * width, channels].
    """
    # Only the two axes become constants of the program; the whole table would be megabytes.
    half = channels // 2
    columns = jnp.asarray(_sincos_axis(width, half, base, scale), dtype)[None, :]
    rows = jnp.asarray(_sincos_axis(height, half, base, scale), dtype)[:, None]
    grid = (height, width, half)
    table = jnp.concatenate([jnp.broadcast_to(columns, grid), jnp.broadcast_to(rows, grid)], -1)
    return table.reshape(height * width, channels)


def patchify(x_BHWC: jax.Array, patch: int, *, channels_first: bool = False) -> jax.Array:
    """Patches [B, H/p * W/p, p * p * C] of latents [B, H, W, C], row by row.

    Args:
      x_BHWC: latents.
      patch: side p.
      channels_first: a patch's channels in the order (C, p, p), as diffusers packs latents, in
        place of (p, p, C).

    Raises: InputError if p does not divide H and W.
    """
    b, h, w, c = x_BHWC.shape
    if h % patch or w % patch:
        raise InputError(f"latents: found {h} x {w}; expected multiples of the patch size {patch}")
    x = x_BHWC.reshape(b, h // patch, patch, w // patch, patch, c).swapaxes(2, 3)
    x = jnp.moveaxis(x, -1, 3) if channels_first else x
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(
    tokens_BND: jax.Array, height: int, width: int, patch: int, *, channels_first: bool = False
) -> jax.Array:
    """Inverse of `patchify` for latents of `height` x `width`."""
    h, w = height // patch, width // patch
    inner = (-1, patch, patch) if channels_first else (patch, patch, -1)
    x = tokens_BND.reshape(tokens_BND.shape[0], h, w, *inner)
    x = (jnp.moveaxis(x, 3, -1) if channels_first else x).swapaxes(2, 3)
    return x.reshape(x.shape[0], height, width, -1)


class PatchProjection(nnx.Module):
    """Patch embedding [B, H, W, C] -> [B, N, D]: a convolution of stride p as a matrix product."""

    def __init__(self, channels: int, dim: int, patch: int, *, dtype, rngs: Keys):
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2))
        self.kernel = nnx.Param(init(rngs.params(), (patch, patch, channels, dim)))
        self.bias = nnx.Param(jnp.zeros(dim))
        self.patch, self.dtype = patch, dtype

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        tokens = patchify(x_BHWC.astype(self.dtype), self.patch)
        return ops.linear(tokens, ops.as_matrix(kernel)) + bias


class Mlp(nnx.Module):
    """MLP: two biased linear layers with an activation between them.

    Used for the timestep embedding (silu), the caption projection and the feed-forward (gelu_tanh).

    Args:
      features, hidden, out: widths of the input, the hidden layer and the output.
      activation: elementwise.
      dtype: of the computation.
      rngs: keys of the initialisers.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        out: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        dtype,
        rngs: Keys,
    ):
        self.linear_1 = Linear(features, hidden, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(hidden, out, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(self.activation(self.linear_1(x)))

    def gated_residual(self, base_BND, gate, x_BND: jax.Array, remat: bool) -> jax.Array:
        """base + gate * mlp(x), in chunks of hidden units under remat.

        Reverse mode holds the hidden layer and its tangent in memory, both after the activation
        too, and the cotangents of all four. Every weight belongs to a single hidden unit, so that
        chunks communicate no more between devices than the layer at once.

        Args:
          base_BND: the residual stream.
          gate: factor of the MLP's output, broadcastable to it.
          x_BND: input of the MLP.
          remat: whether reverse mode recomputes the block that this is part of; if so, a large
            hidden layer is made in chunks, which are always recomputed.

        Returns: [B, N, D] in the dtype of `base_BND`.
        """
        count, shards = 1, 1
        if remat:
            count, shards = hidden_chunks(x_BND.shape, self.linear_1.out_features)
        if count == 1:
            return base_BND + gate * self(x_BND)

        def split(weight: jax.Array, axis: int) -> jax.Array:
            """Chunks [count, ...] of a weight, each with an equal part of every shard."""
            before, after = weight.shape[:axis], weight.shape[axis + 1 :]
            weight = weight.reshape(*before, shards, count, -1, *after)
            return jnp.moveaxis(weight, axis + 1, 0).reshape(count, *before, -1, *after)

        def add(total_BND, weights):
            enter, bias, leave = (weight.astype(x_BND.dtype) for weight in weights)
            out = ops.linear(self.activation(ops.linear(x_BND, enter) + bias), leave)
            return constrain_batch(total_BND + gate * out, tokens=True), None

        first, last = self.linear_1, self.linear_2
        wide = jnp.promote_types(x_BND.dtype, jnp.float32)  # or each chunk would round the sum
        enter = ops.chunks(first.kernel[...], 1, split)
        leave = ops.chunks(last.kernel[...], 0, split)
        weights = enter, split(first.bias[...], 0), leave
        total_BND = base_BND.astype(wide) + gate * last.bias[...].astype(x_BND.dtype)
        total_BND, _ = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), total_BND, weights)
        return total_BND.astype(base_BND.dtype)


def hidden_chunks(shape: tuple[int, ...], hidden: int) -> tuple[int, int]:
    """Chunks of a hidden layer so wide over tokens [B, N, D], and devices that share its units.

    Outside of training, where no mesh is known, both are 1.
    """
    if current_placement.value is None:
        return 1, 1
    mesh = current_placement.value.mesh
    shards = math.gcd(hidden, mesh.shape["tensor"])
    size = (
        shape[0]
        * shape[1]
        * hidden
        // (batch_shards(mesh) * sequence_shards(mesh, shape[1]) * shards)
    )
    counts = [n for n in range(1, MAX_CHUNKS + 1) if hidden % (n * shards) == 0]
    return next((n for n in counts if size <= n * MAX_CHUNK_ELEMENTS), counts[-1]), shards


class Attention(nnx.Module):
    """Multi-head attention: cross-attention to a context, or self-attention without one.

    Variants of a family override `queries`, `keys_values` and `attend`.

    Args:
      dim: width D of the tokens.
      heads, head_dim: number of heads and width K of one.
      context_dim: width C of the context; None: the tokens'.
      bias: of the projections to queries, keys and values.
      out_bias: of the output projection.
      dtype: of the computation.
      rngs: keys of the initialisers.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        context_dim: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        dtype,
        rngs: Keys,
    ):
        inner, context_dim = heads * head_dim, dim if context_dim is None else context_dim
        self.to_q = Linear(dim, inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_k = Linear(context_dim, inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_v = Linear(context_dim, inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_out = Linear(inner, dim, use_bias=out_bias, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(
        self,
        x_BND: jax.Array,
        context: jax.Array | TextKV | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Attention output [B, N, D] of tokens [B, N, D].

        Args:
          x_BND: tokens that attend.
          context: tokens [B, M, C] or their KV cache; None: the tokens themselves.
          bias: broadcasts to the logits [B, heads, N, M].
        """
        if not isinstance(context, TextKV):
            context = self.keys_values(x_BND if context is None else context)
        projected = self.queries(x_BND), *context
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in projected)
        out_BNHK = self.attend(q, k, v, bias)
        return self.to_out(out_BNHK.reshape(*out_BNHK.shape[:2], -1))

    def queries(self, x_BND: jax.Array) -> jax.Array:
        return self.to_q(x_BND)

    def keys_values(self, context_BMC: jax.Array) -> TextKV:
        return TextKV(self.to_k(context_BMC), self.to_v(context_BMC))

    def attend(self, q_BNHK, k_BMHK, v_BMHK, bias) -> jax.Array:
        return attention(q_BNHK, k_BMHK, v_BMHK, bias)


def text_kv(blocks: nnx.Module, text_BMC: jax.Array) -> TextKV:
    """KV cache [layers, B, M, H*K] of a prompt, for the cross-attention ("attn2") of a stack."""
    return jax.lax.map(
        lambda block: constrain_batch(block.attn2.keys_values(text_BMC), unconstrained=True), blocks
    )
