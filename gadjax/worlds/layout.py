"""Layout tasks of the shapes world: captions without a position, and the distance to a target."""

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.worlds.shapes import CELLS, POSITIONS

# Captions that leave position, size and background to the noise, in inks that contrast with every
# background; two of every shape.
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
# Position word -> centre of its cell, (x, y) in pixels.
POSITION_CENTRES = {
    word: tuple(float(np.mean(CELLS[cell])) for cell in cells) for word, cells in POSITIONS.items()
}


def centre(image_HWC: jax.Array) -> jax.Array:
    """Centre of the shape, (x, y) in pixels: the mean position, weighted by squared contrast.

    The background is the median of the border, which a shape may touch but never fills; it has a
    stop-gradient. Contrast is squared, so that faint noise far away weighs little.
    """
    height, width, channels = image_HWC.shape
    border = jnp.concatenate(
        [image_HWC[0], image_HWC[-1], image_HWC[1:-1, 0], image_HWC[1:-1, -1]]
    ).reshape(-1, channels)
    background = jax.lax.stop_gradient(jnp.median(border, axis=0))
    weight_HW = jnp.sum((image_HWC - background) ** 2, axis=-1)
    x = jnp.sum(weight_HW.sum(0) * (jnp.arange(width) + 0.5))
    y = jnp.sum(weight_HW.sum(1) * (jnp.arange(height) + 0.5))
    # The constant gives an empty image centre 0 and gradient 0 in place of NaN.
    return jnp.stack([x, y]) / (weight_HW.sum() + 1e-3)


def squared_distance(image_HWC: jax.Array, target_2: jax.Array) -> jax.Array:
    """Squared distance of the shape's centre from `target_2`, in square pixels."""
    return jnp.sum((centre(image_HWC) - target_2) ** 2)
