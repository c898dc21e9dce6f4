"""Interpolation between noises: arcs, path length and evenness. M paths, K points, D values."""

import numpy as np


def slerp(a: np.ndarray, b: np.ndarray, points: int) -> np.ndarray:
    """Spherical interpolation from a to b, both included, in even steps: [points, *a.shape].

    The norm is interpolated linearly, so that every point is as plausible a noise as the ends.

    Args:
      a: first noise, any shape.
      b: last noise, not opposite to a.
      points: number of points.
    """
    sizes = np.linalg.norm(a), np.linalg.norm(b)
    start, end = a / sizes[0], b / sizes[1]
    angle = np.arccos(np.clip(np.sum(start * end), -1, 1))
    share = np.linspace(0, 1, points).reshape(-1, *[1] * np.ndim(a))
    if angle < 1e-6:  # sin(s angle) / sin(angle) is then s
        arc = (1 - share) * start + share * end
    else:
        arc = (np.sin((1 - share) * angle) * start + np.sin(share * angle) * end) / np.sin(angle)
    return (arc * ((1 - share) * sizes[0] + share * sizes[1])).astype(a.dtype)


def path_steps(x_MKD: np.ndarray) -> np.ndarray:
    """Root mean square differences of neighbours: [M, K - 1]; their sum is the path's length."""
    return np.sqrt(np.square(np.diff(np.asarray(x_MKD, np.float64), axis=1)).mean(-1))


def largest_jump(steps_MK: np.ndarray) -> np.ndarray:
    """Largest step as a share of its path's length: [M], from 1 / steps (even) to 1.

    A path on which nothing changes counts as even.
    """
    length = steps_MK.sum(1)
    even = 1 / steps_MK.shape[1]
    return np.where(length > 0, steps_MK.max(1) / np.where(length > 0, length, 1), even)
