"""Separable resizing inside a program, with torch's weights: for position tables and Inception.

`jax.image.resize` has another cubic filter (a = -0.5 in place of -0.75) without antialias, and
renormalises at the edges where torch repeats the outermost row.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981) with parameter a."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache(maxsize=64)
def resize_weights(source: int, target: int, method: str, antialias: bool) -> np.ndarray:
    """Weights [target, source] of a resized axis, as torch's F.interpolate(align_corners=False).

    Args:
      source, target: lengths of the axis.
      method: "bilinear" or "bicubic".
      antialias: widen the filter where the axis shrinks; bicubic then has a = -0.5, else -0.75.
    """
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale - 0.5
    if antialias:
        wide = max(scale, 1.0)
        distance = (np.arange(source)[None, :] - centres[:, None]) / wide
        hat = np.maximum(1 - np.abs(distance), 0.0)
        weights = hat if method == "bilinear" else _cubic(distance, -0.5)
        return weights / weights.sum(1, keepdims=True)
    reach = 1 if method == "bilinear" else 2
    if method == "bilinear":
        centres = np.maximum(centres, 0)
    first = np.floor(centres).astype(int)
    weights = np.zeros((target, source))
    for offset in range(1 - reach, 1 + reach):
        distance = centres - (first + offset)
        value = 1 - np.abs(distance) if method == "bilinear" else _cubic(distance, -0.75)
        column = np.clip(first + offset, 0, source - 1)
        np.add.at(weights, (np.arange(target), column), value)
    return weights


def resize_axes(
    x_BHWC: jax.Array, size: tuple[int, int], method: str, *, antialias: bool
) -> jax.Array:
    """Resize [B, H, W, C] to `size`, axis by axis; see `resize_weights`."""
    rows, columns = (
        jnp.asarray(resize_weights(source, target, method, antialias), x_BHWC.dtype)
        for source, target in zip(x_BHWC.shape[1:3], size, strict=True)
    )
    highest = jax.lax.Precision.HIGHEST
    x_BHWC = jnp.einsum("oh,bhwc->bowc", rows, x_BHWC, precision=highest)
    return jnp.einsum("pw,bowc->bopc", columns, x_BHWC, precision=highest)
