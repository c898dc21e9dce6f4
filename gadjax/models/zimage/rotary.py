"""Positions of tokens in three axes: caption, row, column.

The caption's tokens are at (f, 0, 0), (f + 1, 0, 0), ... and the image's at (f + n, row, column),
after the n tokens of their sample's caption, learned padding included: they differ from sample to
sample. f is 1 in Z-Image and 0 in Lumina 2. Rotations are those of `gadjax.models.rotary`; R is
half the width of a head.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.errors import InputError
from gadjax.models.rotary import axis_rotation, grid_rotation
from gadjax.models.zimage.config import PATCH, Config


def _axis(c: Config, axis: int, count: int) -> np.ndarray:
    """Rotation [2, count, dims / 2] of an axis's first positions.

    Angles are rounded where diffusers rounds them: far from the start it shows.
    """
    width = c.axes_dims[axis]
    if not c.rounds_angles:
        return axis_rotation(range(count), width, c.rope_theta)
    rates = c.rope_theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    angles = (np.arange(count, dtype=np.float64)[:, None] * rates).astype(np.float32)
    return np.stack([np.cos(angles), np.sin(angles)])


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
    longest = c.axes_lens[0] - c.first_position - 1
    if tokens > longest:
        raise InputError(
            f"length: found {tokens} tokens with their padding; expected at most {longest}, as "
            f"many as axes_lens {list(c.axes_lens)} has positions for"
        )


def caption_rotation(c: Config, tokens: int) -> jax.Array:
    """Rotation [2, 1, tokens, R] of the caption, the same for all samples."""
    others = sum(c.axes_dims[1:]) // 2
    first = _axis(c, 0, tokens + c.first_position)[:, c.first_position :]
    return jnp.concatenate([first, _still(tokens, others)], -1)[:, None]


def image_rotation(
    c: Config, sides: tuple[int, int, int], tokens: int, count_B: jax.Array
) -> jax.Array:
    """Rotation [2, B, N, R] of the image and of its padding, which is not rotated.

    Args:
      c: the network's options.
      sides: rows and columns of the image's patches, and number of tokens of its padding.
      tokens: the longest caption with its padding.
      count_B: tokens of each caption with their padding.
    """
    rows, columns, pads = sides
    first = jnp.asarray(_axis(c, 0, tokens + c.first_position + 1))
    first = first[:, count_B + c.first_position, None]
    grid = grid_rotation(_axis(c, 1, rows), _axis(c, 2, columns))[:, None]
    shape = 2, len(count_B), rows * columns
    parts = [jnp.broadcast_to(part, (*shape, part.shape[-1])) for part in (first, grid)]
    still = jnp.repeat(_still(pads, sum(c.axes_dims) // 2)[:, None], len(count_B), axis=1)
    return jnp.concatenate([jnp.concatenate(parts, axis=-1), still], axis=2)


def _still(tokens: int, pairs: int) -> jax.Array:
    """Rotation [2, tokens, pairs] by nothing."""
    return jnp.stack([jnp.ones((tokens, pairs)), jnp.zeros((tokens, pairs))])
