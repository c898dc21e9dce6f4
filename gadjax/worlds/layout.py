"""What the noise alone decides in the shapes world, and how far a shape is from a wanted place."""

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.worlds.shapes import CELLS, POSITIONS

# They leave position, size and background to the noise, in inks that stand out from every
# background; each shape twice.
CAPTIONS = (
    "a red circle",
    "a blue square",
    "a green triangle",
    "a yellow cross",
    "a purple circle",
    "a red square",
    "a blue triangle",
    "a green cross",
)
# The middle of every position's cell, (x, y) in pixels.
POSITION_CENTRES = {
    word: tuple(float(np.mean(CELLS[cell])) for cell in cells) for word, cells in POSITIONS.items()
}


def centre(image_HWC: jax.Array) -> jax.Array:
    """(x, y) in pixels of what differs from the background, weighted by its squared difference.

    The background is the median of the border, which a shape may touch but never fills; taken as
    it is, not differentiated. Squares, so that faint noise far away weighs little.
    """
    height, width, channels = image_HWC.shape
    border = jnp.concatenate(
        [image_HWC[0], image_HWC[-1], image_HWC[1:-1, 0], image_HWC[1:-1, -1]]
    ).reshape(-1, channels)
    background = jax.lax.stop_gradient(jnp.median(border, axis=0))
    weight_HW = jnp.sum((image_HWC - background) ** 2, axis=-1)
    x = jnp.sum(weight_HW.sum(0) * (jnp.arange(width) + 0.5))
    y = jnp.sum(weight_HW.sum(1) * (jnp.arange(height) + 0.5))
    # An empty picture has its centre at 0 and no gradient, rather than neither.
    return jnp.stack([x, y]) / (weight_HW.sum() + 1e-3)


def squared_distance(image_HWC: jax.Array, place_2: jax.Array) -> jax.Array:
    """Of the shape's centre from `place_2`, in square pixels."""
    return jnp.sum((centre(image_HWC) - place_2) ** 2)
