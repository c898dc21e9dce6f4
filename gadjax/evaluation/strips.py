"""Strips: pictures of some prompts along the arc between two noises, and along a direction.

They are drawn to be looked at, by every model from the same noises.
"""

from collections.abc import Sequence

import numpy as np

from gadjax.evaluation.interpolation import slerp
from gadjax.pipelines.sampling import initial_noise

POINTS = 9
REACH_DEGREES = 40  # to which a noise is turned along a direction, to both sides
WAYS = "path", "direction"


def strip_prompts(count: int, shown: int) -> list[int]:
    """Indices of at most `shown` of `count` prompts, evenly over their list."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(shown, count)).round()})


def strip_set(
    prompts: Sequence[str], indices: Sequence[int], latent: tuple[int, int, int], direction: int
) -> tuple[list[str], np.ndarray]:
    """Prompts and noises [K, M, POINTS] of the strips, flattened.

    A path leads on the great arc from the noise of seed 0 to that of seed 1. A direction is v of
    the tangents J v: the noise z of seed 0 is turned towards it, z cos a + v |z| / |v| sin a, so
    that to first order the picture moves along J v.

    Args:
      prompts: P prompts.
      indices: of the K prompts.
      latent: shape (H, W, C) of a noise.
      direction: seed of the directions.
    """
    z, other, v = (initial_noise(seed, len(prompts), latent) for seed in (0, 1, direction))
    angles = np.radians(np.linspace(-REACH_DEGREES, REACH_DEGREES, POINTS)).astype(z.dtype)
    turned = [np.cos(a) * z + np.sin(a) * v * (_norm(z) / _norm(v)) for a in angles]
    ways = [np.stack([slerp(z[p], other[p], POINTS), [x[p] for x in turned]]) for p in indices]
    noises = np.concatenate(ways).reshape(-1, *latent)
    return [prompts[p] for p in indices for _ in range(len(WAYS) * POINTS)], noises


def as_strips(images_NHWC: np.ndarray) -> np.ndarray:
    """Reorder the pictures of `strip_set` to [K, M, POINTS, H, W, 3]."""
    return images_NHWC.reshape(-1, len(WAYS), POINTS, *images_NHWC.shape[1:])


def _norm(x_NHWC: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(x_NHWC).sum((1, 2, 3), keepdims=True))
