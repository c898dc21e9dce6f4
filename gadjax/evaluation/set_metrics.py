"""Distances between two sets of features: KID, CMMD, precision, recall, density, coverage.

N and M pictures, D features; float64, in blocks of rows. All compare sets of equal size only.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from gadjax.errors import InputError

BLOCK = 1024  # rows of a matrix between all pictures that are in memory
SUBSETS, SUBSET = 100, 1000  # of KID, as torch-fidelity and clean-fid have them
NEIGHBOURS = 5
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def kid(a_ND: np.ndarray, b_MD: np.ndarray, seed: int = 0) -> float:
    """Kernel distance with the cubic kernel (x y / D + 1)^3, unbiased: it may be negative.

    Binkowski et al. 2018 (on Inception; on DINOv2 dgm-eval's KD). Of more than 1000 pictures the
    mean over 100 random subsets of 1000, as published values are taken.
    """
    width = a_ND.shape[1]

    def kernel(x, y):
        return (x @ y.T / width + 1) ** 3

    size = min(SUBSET, len(a_ND), len(b_MD))
    if size == len(a_ND) == len(b_MD):
        return mmd(a_ND, b_MD, kernel)
    rng = np.random.default_rng(seed)
    draws = (
        (rng.choice(len(x), size, replace=False) for x in (a_ND, b_MD)) for _ in range(SUBSETS)
    )
    return float(np.mean([mmd(a_ND[i], b_MD[j], kernel) for i, j in draws]))


def cmmd(a_ND: np.ndarray, b_MD: np.ndarray, *, unbiased: bool = True) -> float:
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024): Gaussian of sigma 10, times 1000.

    Of vectors of length 1, on which it is nearly 10 |difference of the means|^2: blind to spread.

    Args:
      a_ND, b_MD: projected CLIP features; they are normalised here.
      unbiased: leave the diagonal out; with it (published values) it is larger by about 10 / N.
    """
    a, b = (
        x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        for x in (np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64))
    )

    def kernel(x, y):
        return np.exp(-_squared_distances(x, y) / (2 * CMMD_SIGMA**2))

    return CMMD_SCALE * mmd(a, b, kernel, unbiased=unbiased)


def mmd(a_ND: np.ndarray, b_MD: np.ndarray, kernel: Kernel, *, unbiased: bool = True) -> float:
    """Squared maximum mean discrepancy of a kernel (Gretton et al. 2012).

    Args:
      a_ND, b_MD: features.
      kernel: (x [n, D], y [m, D]) -> [n, m].
      unbiased: leave the kernel of a picture with itself out.
    """
    a, b = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    within = []
    for x in (a, b):
        total = sum(kernel(part, x).sum() for _, part in _blocks(x))
        diagonal = sum(np.trace(kernel(part, part)) for _, part in _blocks(x))
        count = len(x)
        within.append((total - diagonal) / (count * (count - 1)) if unbiased else total / count**2)
    between = sum(kernel(part, b).sum() for _, part in _blocks(a)) / (len(a) * len(b))
    return float(within[0] + within[1] - 2 * between)


class Support(NamedTuple):
    """Overlap of the supports of two sets; see `support_overlap`."""

    precision: float
    recall: float
    density: float
    coverage: float


def support_overlap(
    reference_ND: np.ndarray, sampled_MD: np.ndarray, neighbours: int = NEIGHBOURS
) -> Support:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A picture lies in the other set's support where it is nearer to a picture of it than that one's
    k-th neighbour in its set is.

    Args:
      reference_ND: features of the reference set.
      sampled_MD: features of the evaluated set.
      neighbours: k.
    Raises: InputError for sets of at most k pictures.
    """
    if min(len(reference_ND), len(sampled_MD)) <= neighbours:
        raise InputError(
            f"precision and recall: found {min(len(reference_ND), len(sampled_MD))} pictures; "
            f"expected more than {neighbours} neighbours"
        )
    real, fake = (np.asarray(x, np.float64) for x in (reference_ND, sampled_MD))
    radius_real, radius_fake = _radii(real, neighbours), _radii(fake, neighbours)
    in_real_M = np.zeros(len(fake))
    recalled_N, covered_N = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for start, part in _blocks(real):
        rows = slice(start, start + len(part))
        distances = np.sqrt(_squared_distances(part, fake))
        inside = distances < radius_real[rows, None]
        in_real_M += inside.sum(0)
        covered_N[rows] = inside.any(1)
        recalled_N[rows] = (distances < radius_fake).any(1)
    return Support(
        float((in_real_M > 0).mean()),
        float(recalled_N.mean()),
        float(in_real_M.mean() / neighbours),
        float(covered_N.mean()),
    )


def _radii(x_ND: np.ndarray, neighbours: int) -> np.ndarray:
    """Distance of every picture to its k-th neighbour, itself left out: [N]."""
    radii = []
    for start, part in _blocks(x_ND):
        squared = _squared_distances(part, x_ND)
        squared[np.arange(len(part)), start + np.arange(len(part))] = -1.0
        radii.append(np.sqrt(np.partition(squared, neighbours, axis=1)[:, neighbours]))
    return np.concatenate(radii)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.maximum(squared, 0)


def _blocks(x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(x), BLOCK):
        yield start, x[start : start + BLOCK]
