"""Fréchet distance between two sets of pictures, as Gaussians of their features."""

import numpy as np

from gadjax.errors import InputError


def frechet(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Fréchet distance |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    Dowson and Landau 1982; Heusel et al. 2017 for pictures. Falls with N towards its limit
    (`frechet_limit`), so compare values of equal N only.
    Raises: InputError where a set has no more pictures than features: its covariance is singular.
    """
    for features in (a_ND, b_ND):
        count, width = features.shape
        if count <= width:
            raise InputError(
                f"frechet: found {count} pictures of {width} features; expected more pictures"
            )
    a_ND, b_ND = np.asarray(a_ND, np.float64), np.asarray(b_ND, np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a_ND, b_ND))
    # S_a S_b has the eigenvalues of the symmetric root(S_a) S_b root(S_a).
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    shift = ((a_ND.mean(0) - b_ND.mean(0)) ** 2).sum()
    # Rounding may leave equal sets slightly below zero.
    return float(max(0.0, shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def frechet_limit(a_PSD: np.ndarray, b_PSD: np.ndarray) -> float:
    """Fréchet distance extrapolated to infinitely many seeds of the same prompts.

    The bias falls as 1 / N (Chong and Forsyth, arXiv:1911.07023, who fit a line to random subsets
    of one set). Here both sets shrink together, to halves of the seeds: subsets of pictures would
    no longer hold every prompt equally often. Of sets of one law it may be negative.

    Args:
      a_PSD, b_PSD: features of pictures of P prompts at S seeds, 2 or more.
    Raises: InputError where half of the seeds give no more pictures than features.
    """
    seeds = a_PSD.shape[1]
    half = seeds // 2
    halves = [
        frechet(*(_flat(x[:, start : start + half]) for x in (a_PSD, b_PSD))) for start in (0, half)
    ]
    full = frechet(_flat(a_PSD), _flat(b_PSD))
    return float((seeds * full - half * np.mean(halves)) / (seeds - half))


def _flat(x_PSD: np.ndarray) -> np.ndarray:
    return x_PSD.reshape(-1, x_PSD.shape[-1])
