"""Vision transformer: CLIP's, SigLIP's, DINOv2's and DINOv3's in one network.

Shapes: B pictures [B, H, W, 3], normalised as the network was trained; N tokens (class token,
registers, patches row by row), D width, P width of CLIP's projection.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gadjax.errors import InputError
from gadjax.models import layers
from gadjax.models.module import Keys, scan_blocks, stack
from gadjax.models.text.siglip import ACTIVATIONS as TEXT_ACTIVATIONS
from gadjax.models.vision.config import VisionConfig
from gadjax.models.vision.resize import resize_axes
from gadjax.ops.attention import attention

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = TEXT_ACTIVATIONS | {
    "gelu_new": layers.gelu_tanh,
    "silu": jax.nn.silu,
}


class Encoded(NamedTuple):
    """Outputs of a vision transformer.

    Attributes:
      last: [B, N, D] last hidden states, as transformers' last_hidden_state: CLIP's without the
        final norm, the others' with it.
      raw: [B, D] class token without the final norm; None for SigLIP.
      pooled: [B, D] class token with the final norm, or the output of SigLIP's head; None for a
        SigLIP without a head.
      projected: [B, P] CLIP's projection of `pooled`; None without one.
    """

    last: jax.Array
    raw: jax.Array | None
    pooled: jax.Array | None
    projected: jax.Array | None


def _norm(c: VisionConfig, dtype, rngs: Keys) -> nnx.LayerNorm:
    return nnx.LayerNorm(c.width, epsilon=c.eps, use_fast_variance=False, dtype=dtype, rngs=rngs)


def _vector(rngs: Keys, *shape: int) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


class Attention(nnx.Module):
    """Multi-head self-attention; with an angle for each patch its queries and keys are rotated."""

    def __init__(self, c: VisionConfig, dtype, rngs: Keys):
        for name, bias in zip(("q", "k", "v", "out"), c.biases[:4], strict=True):
            linear = layers.Linear(c.width, c.width, use_bias=bias, dtype=dtype, rngs=rngs)
            setattr(self, name, linear)
        self.heads = c.heads

    def __call__(self, x_BND, angles_NK):
        q, k, v = (
            proj(x_BND).reshape(*x_BND.shape[:2], self.heads, -1)
            for proj in (self.q, self.k, self.v)
        )
        if angles_NK is not None:
            q, k = rotate_patches(q, angles_NK), rotate_patches(k, angles_NK)
        return self.out(attention(q, k, v).reshape(x_BND.shape))


class FeedForward(nnx.Module):
    """MLP of a block: linear, activation, linear; gated where the configuration has a gate."""

    def __init__(self, c: VisionConfig, dtype, rngs: Keys):
        bias = c.biases[4]
        up = 2 * c.hidden if c.gate == "fused" else c.hidden
        self.up = layers.Linear(c.width, up, use_bias=bias, dtype=dtype, rngs=rngs)
        if c.gate == "split":
            self.gate = layers.Linear(c.width, c.hidden, use_bias=bias, dtype=dtype, rngs=rngs)
        self.down = layers.Linear(c.hidden, c.width, use_bias=bias, dtype=dtype, rngs=rngs)
        # DINOv2's SwiGLU is silu, whatever hidden_act is.
        self.activation = jax.nn.silu if c.gate == "fused" else ACTIVATIONS[c.activation]
        self.kind = c.gate

    def __call__(self, x_BND):
        up = self.up(x_BND)
        if self.kind == "fused":
            gate, up = jnp.split(up, 2, axis=-1)
            return self.down(self.activation(gate) * up)
        if self.kind == "split":
            return self.down(self.activation(self.gate(x_BND)) * up)
        return self.down(self.activation(up))


class Block(nnx.Module):
    """Pre-norm block with residuals; DINO's scale the output of both halves by channel."""

    def __init__(self, c: VisionConfig, dtype, rngs: Keys):
        self.norm1 = _norm(c, dtype, rngs)
        self.attention = Attention(c, dtype, rngs)
        self.norm2 = _norm(c, dtype, rngs)
        self.mlp = FeedForward(c, dtype, rngs)
        self.scaled = c.kind in ("dinov2", "dinov3")
        if self.scaled:
            self.layer_scale1 = nnx.Param(jnp.ones(c.width))
            self.layer_scale2 = nnx.Param(jnp.ones(c.width))

    def __call__(self, x_BND, angles_NK=None):
        h = self.attention(self.norm1(x_BND), angles_NK)
        x_BND = x_BND + (h * self.layer_scale1[...].astype(h.dtype) if self.scaled else h)
        h = self.mlp(self.norm2(x_BND))
        return x_BND + (h * self.layer_scale2[...].astype(h.dtype) if self.scaled else h)


class PoolingHead(nnx.Module):
    """Attention pooling of SigLIP: a learned probe attends to all patches; MLP with residual."""

    def __init__(self, c: VisionConfig, dtype, rngs: Keys):
        self.probe = _vector(rngs, 1, 1, c.width)
        self.in_proj = layers.Linear(c.width, 3 * c.width, dtype=dtype, rngs=rngs)
        self.out_proj = layers.Linear(c.width, c.width, dtype=dtype, rngs=rngs)
        self.norm = _norm(c, dtype, rngs)
        self.fc1 = layers.Linear(c.width, c.hidden, dtype=dtype, rngs=rngs)
        self.fc2 = layers.Linear(c.hidden, c.width, dtype=dtype, rngs=rngs)
        self.heads, self.activation = c.heads, ACTIVATIONS[c.activation]

    def __call__(self, x_BND):
        b, _, width = x_BND.shape
        probe = jnp.broadcast_to(self.probe[...].astype(x_BND.dtype), (b, 1, width))
        q = jnp.split(self.in_proj(probe), 3, axis=-1)[0]
        k, v = jnp.split(self.in_proj(x_BND), 3, axis=-1)[1:]
        q, k, v = (x.reshape(b, -1, self.heads, width // self.heads) for x in (q, k, v))
        h = self.out_proj(attention(q, k, v).reshape(b, 1, width))
        return (h + self.fc2(self.activation(self.fc1(self.norm(h)))))[:, 0]


class VisionTransformer(nnx.Module):
    """Vision transformer: `net(x_BHWC) -> Encoded`, without dropout.

    Pictures of another size than the table of positions take an interpolated table; rows and
    columns beyond the last whole patch are not read.
    Raises: InputError for a picture smaller than a patch.
    """

    def __init__(self, config: VisionConfig, dtype, remat: bool, rngs: Keys):
        c = config
        self.config, self.remat, self.dtype = config, remat, dtype
        self.patch = layers.Conv(
            *(3, c.width, (c.patch, c.patch)),
            strides=c.patch,
            padding="VALID",
            use_bias=c.kind != "clip",
            dtype=dtype,
            rngs=rngs,
        )
        tokens = (c.image_size // c.patch) ** 2 + (c.kind != "siglip")
        if c.kind != "siglip":
            shape = (c.width,) if c.kind == "clip" else (1, 1, c.width)
            self.class_token = _vector(rngs, *shape)
        if c.kind == "dinov2":
            self.positions = _vector(rngs, 1, tokens, c.width)
        elif c.kind != "dinov3":
            self.positions = _vector(rngs, tokens, c.width)
        if c.registers or c.register_table or c.kind == "dinov3":
            self.registers = _vector(rngs, 1, c.registers, c.width)
        if c.kind == "clip":
            self.pre_norm = _norm(c, dtype, rngs)
        self.blocks = stack(lambda r: Block(c, dtype, r), c.layers, rngs)
        self.norm = _norm(c, dtype, rngs)
        if c.projection:
            self.projection = layers.Linear(
                c.width, c.projection, use_bias=False, dtype=dtype, rngs=rngs
            )
        if c.kind == "siglip" and c.head:
            self.head = PoolingHead(c, dtype, rngs)

    def _embed(self, x_BHWC: jax.Array) -> jax.Array:
        c = self.config
        h_BND = self.patch(x_BHWC.astype(self.dtype))
        rows, columns = h_BND.shape[1:3]
        h_BND = h_BND.reshape(len(h_BND), rows * columns, c.width)
        parts = [h_BND]
        if c.kind != "siglip":
            token = self.class_token[...].reshape(1, 1, -1).astype(h_BND.dtype)
            parts = [jnp.broadcast_to(token, (len(h_BND), 1, c.width)), h_BND]
        h_BND = jnp.concatenate(parts, axis=1)
        if c.kind != "dinov3":
            table = self.positions[...].reshape(1, -1, c.width)
            first = int(c.kind != "siglip")
            grid = resize_positions(table[:, first:], rows, columns, antialias=c.register_table)
            h_BND = h_BND + jnp.concatenate([table[:, :first], grid], 1).astype(h_BND.dtype)
        if c.registers:
            registers = self.registers[...].astype(h_BND.dtype)
            registers = jnp.broadcast_to(registers, (len(h_BND), *registers.shape[1:]))
            h_BND = jnp.concatenate([h_BND[:, :1], registers, h_BND[:, 1:]], axis=1)
        return h_BND

    def __call__(self, x_BHWC: jax.Array) -> Encoded:
        c, (height, width) = self.config, x_BHWC.shape[1:3]
        if min(height, width) < c.patch:
            raise InputError(
                f"pictures: found {height} x {width}; expected at least a patch of {c.patch} pixels"
            )
        h_BND = self._embed(x_BHWC)
        if c.kind == "clip":
            h_BND = self.pre_norm(h_BND)
        angles = None
        if c.kind == "dinov3":
            size = height // c.patch, width // c.patch
            angles = jnp.asarray(rotary_angles(*size, c.width // c.heads, c.theta))
        # Over all blocks alike, so that it is no scanned value.
        h_BND = scan_blocks(self.blocks, h_BND, lambda block, x: block(x, angles), self.remat)
        if c.kind == "clip":
            raw = h_BND[:, 0]
            pooled = self.norm(raw)
            return Encoded(h_BND, raw, pooled, self.projection(pooled) if c.projection else None)
        last = self.norm(h_BND)
        if c.kind == "siglip":
            return Encoded(last, None, self.head(last) if c.head else None, None)
        return Encoded(last, h_BND[:, 0], last[:, 0], None)


def resize_positions(
    table_1ND: jax.Array, rows: int, columns: int, *, antialias: bool
) -> jax.Array:
    """Table of positions [1, rows * columns, D] interpolated from a square one, as transformers.

    Bicubic: torch's a = -0.75 without antialias; a = -0.5 with it (DINOv2 with registers).
    """
    _, count, width = table_1ND.shape
    side = int(count**0.5)
    if (rows, columns) == (side, side):
        return table_1ND
    grid = table_1ND.astype(jnp.float32).reshape(1, side, side, width)
    grid = resize_axes(grid, (rows, columns), "bicubic", antialias=antialias)
    return grid.reshape(1, rows * columns, width)


def rotary_angles(rows: int, columns: int, head_width: int, theta: float) -> np.ndarray:
    """Angles of DINOv3's rotary positions, float32 [rows * columns, head_width].

    Centres of the patches in [-1, 1], times 2 pi and head_width / 4 frequencies; the row's angles,
    then the column's, and both again for the other half of the channels.
    """
    step = np.arange(0, 1, 4 / head_width, dtype=np.float32)
    frequencies = 1 / np.float32(theta) ** step
    y, x = (2 * (np.arange(n, dtype=np.float32) + 0.5) / n - 1 for n in (rows, columns))
    centres = np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)
    angles = np.float32(2 * np.pi) * centres[:, :, None] * frequencies
    return np.tile(angles.reshape(rows * columns, -1), 2).astype(np.float32)


def rotate_patches(x_BNHK: jax.Array, angles_NK: jax.Array) -> jax.Array:
    """Rotate the last tokens, which are patches; the class token and registers pass as they are."""
    first = x_BNHK.shape[1] - len(angles_NK)
    prefix, x = x_BNHK[:, :first], x_BNHK[:, first:]
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = (f(angles_NK)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    return jnp.concatenate([prefix, x * cos + jnp.concatenate([-b, a], -1) * sin], axis=1)


def build(
    config: VisionConfig, *, dtype=jnp.float32, remat: bool = False
) -> Callable[[Keys], nnx.Module]:
    """Constructor of the network, called with Keys.

    Args:
      config: the network's options.
      dtype: of the computation; parameters are initialised in float32.
      remat: rematerialisation of every block, see `checkpointed`.
    """
    return lambda rngs: VisionTransformer(config, dtype, remat, rngs)
