"""Rotary position embeddings of Z-Image, in three axes: caption, row, column.

The caption's tokens have the positions (1, 0, 0), (2, 0, 0), ... and the image's (n + 1, row,
column), after the n tokens of their sample's caption, padding included: they differ from sample to
sample. R is half the width of a head: each angle rotates a pair of neighbouring channels.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.errors import InputError
from gadjax.models.zimage.config import PATCH, Config


def _table(c: Config, axis: int, count: int) -> np.ndarray:
    """Angles of the positions 0, 1, ... of an axis: float32 [count, dims / 2], from float64."""
    width = c.axes_dims[axis]
    rates = c.rope_theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    return (np.arange(count, dtype=np.float64)[:, None] * rates).astype(np.float32)


def check_lengths(c: Config, rows: int, columns: int, tokens: int) -> None:
    """Check that a sample's positions are within axes_lens.

    Args:
      c: the network's options.
      rows, columns: of the image's patches.
      tokens: of the caption with its padding.

    Raises: InputError for an image or a caption that is too large.
    """
    most = c.axes_lens[1] * PATCH, c.axes_lens[2] * PATCH
    if rows * PATCH > most[0] or columns * PATCH > most[1]:
        raise InputError(
            f"latents: found {rows * PATCH} x {columns * PATCH}; expected at most {most[0]} x "
            f"{most[1]}, as many as axes_lens {list(c.axes_lens)} has positions for"
        )
    if tokens + 2 > c.axes_lens[0]:
        raise InputError(
            f"length: found {tokens} tokens with their padding; expected at most "
            f"{c.axes_lens[0] - 2}, as many as axes_lens {list(c.axes_lens)} has positions for"
        )


def caption_angles(c: Config, tokens: int) -> jax.Array:
    """Angles [1, tokens, R] of the caption, the same for all samples."""
    first = _table(c, 0, tokens + 1)[1:]
    return jnp.pad(first, ((0, 0), (0, sum(c.axes_dims[1:]) // 2)))[None]


def image_angles(c: Config, rows: int, columns: int, tokens: int, count_B: jax.Array) -> jax.Array:
    """Angles [B, rows * columns, R] of the image.

    Args:
      c: the network's options.
      rows, columns: of the image's patches.
      tokens: the longest caption with its padding.
      count_B: tokens of each caption with their padding.
    """
    shape = len(count_B), rows, columns
    parts = (
        jnp.asarray(_table(c, 0, tokens + 2))[count_B + 1][:, None, None],
        jnp.asarray(_table(c, 1, rows))[None, :, None],
        jnp.asarray(_table(c, 2, columns))[None, None],
    )
    angles = [jnp.broadcast_to(part, (*shape, part.shape[-1])) for part in parts]
    return jnp.concatenate(angles, axis=-1).reshape(len(count_B), rows * columns, -1)


def rotate(x_BNHK: jax.Array, angles_BNR: jax.Array) -> jax.Array:
    """Rotate channels 2 i and 2 i + 1 of every head by angle i, in at least float32."""
    wide = jnp.promote_types(x_BNHK.dtype, jnp.float32)
    pairs = x_BNHK.astype(wide).reshape(*x_BNHK.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    cos, sin = (f(angles_BNR.astype(wide))[:, :, None] for f in (jnp.cos, jnp.sin))
    rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.reshape(x_BNHK.shape).astype(x_BNHK.dtype)
