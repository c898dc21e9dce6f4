"""Rotary position embeddings of images (RoPE): several axes, each a part of a head's channels.

A rotation is the cosines and sines of the angles of a head's pairs of channels, [2, ..., K / 2].
Channels 2 i and 2 i + 1 are a pair, as in diffusers' image transformers; language models pair the
two halves instead.
"""

import jax
import jax.numpy as jnp
import numpy as np


def axis_rotation(positions, channels: int, theta: float) -> np.ndarray:
    """Rotation [2, n, channels / 2] at positions of one axis; float32, from angles in float64.

    Args:
      positions: n numbers.
      channels: of a head that this axis rotates; even.
      theta: base of the rates, theta^(-2 j / channels) for pair j.
    """
    rates = theta ** -(np.arange(0, channels, 2, dtype=np.float64) / channels)
    angles = np.asarray(positions, np.float64)[:, None] * rates
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def grid_rotation(*axes: np.ndarray) -> jax.Array:
    """Rotation [2, N, K / 2] of the points of a grid, the last axis fastest.

    axes: an `axis_rotation` each, as many positions as the grid has along the axis.
    """
    # Only the axes become constants of the program; the whole table would be megabytes.
    shape, count = tuple(axis.shape[1] for axis in axes), len(axes)
    parts = [
        jnp.broadcast_to(
            jnp.expand_dims(axis, [1 + i for i in range(count) if i != number]),
            (2, *shape, axis.shape[-1]),
        )
        for number, axis in enumerate(axes)
    ]
    return jnp.concatenate(parts, axis=-1).reshape(2, -1, sum(a.shape[-1] for a in axes))


def rotate_pairs(x_BNHK: jax.Array, rotation: jax.Array) -> jax.Array:
    """Heads with their pairs of channels rotated, in at least float32; in the dtype of x.

    rotation: [2, N, K / 2], or [2, B, N, K / 2] for positions of each sample's own.
    """
    wide = jnp.promote_types(x_BNHK.dtype, jnp.float32)
    pairs = x_BNHK.astype(wide).reshape(*x_BNHK.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    cos, sin = rotation[..., None, :].astype(wide)
    rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.reshape(x_BNHK.shape).astype(x_BNHK.dtype)
