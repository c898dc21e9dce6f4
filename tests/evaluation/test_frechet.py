"""The Fréchet distance against its closed form."""

import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.evaluation.frechet import frechet


def gaussian(mean, cov, count=200, seed=0):
    """A set whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(seed).standard_normal((count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(cov).T + mean


def test_equal_sets_are_at_zero():
    x = np.random.default_rng(0).standard_normal((60, 7))
    assert frechet(x, x) == pytest.approx(0, abs=1e-12)


def test_diagonal_covariances():
    first, second = np.array([1.0, 4.0, 9.0]), np.array([4.0, 0.25, 9.0])
    shift = np.array([1.0, -2.0, 0.5])
    found = frechet(gaussian(shift, np.diag(first)), gaussian(0 * shift, np.diag(second), seed=1))
    expected = (shift**2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-9)


def test_covariances_that_do_not_commute():
    """In two dimensions tr (A B)^(1/2) = sqrt(tr(A B) + 2 sqrt(det A det B))."""
    a, b = np.array([[2.0, 1.2], [1.2, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    found = frechet(gaussian(np.zeros(2), a), gaussian(np.zeros(2), b, seed=1))
    assert found == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-9)


def test_more_pictures_than_features():
    with pytest.raises(InputError, match="found 8 pictures of 8 features"):
        frechet(np.zeros((9, 8)), np.zeros((8, 8)))
