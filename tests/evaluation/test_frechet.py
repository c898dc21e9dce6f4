"""The Fréchet distance against its closed form."""

import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.evaluation.frechet import frechet, frechet_limit


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


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (1.0, 1.3)])
def test_the_limit_is_the_distance_of_the_laws(shift, scale):
    """Of 16 Gaussian features, prompts at means of their own: values of all seeds are far above it,
    half of the seeds are few for them."""
    rng, wide, found = np.random.default_rng(0), 16, []
    for _ in range(60):
        means = 2 * rng.standard_normal((8, 1, wide))
        a, b = (means + rng.standard_normal((8, 7, wide)) for _ in range(2))
        a = scale * (a - means) + means + shift / wide**0.5
        whole = frechet(a.reshape(-1, wide), b.reshape(-1, wide))
        found.append((whole, frechet_limit(a, b)))
        # The law is a mixture, whose covariance is that of the means and of the seeds.
        spread = np.cov((means - means.mean(0))[:, 0], rowvar=False, ddof=0)
        limit = np.eye(wide) * scale**2 + spread, np.eye(wide) + spread
        found[-1] += (shift**2 + bures(*limit),)
    whole, limits, expected = np.transpose(found)
    error = (limits - expected).std() / len(found) ** 0.5
    bias = (whole - expected).mean()
    assert bias > 20 * error
    assert abs((limits - expected).mean()) < max(3 * error, 0.1 * bias)


def bures(a, b):
    """tr(A + B - 2 (A B)^(1/2)), by the eigenvalues of A B."""
    return np.trace(a + b) - 2 * np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()


def test_the_limit_by_hand():
    """A line through the values of all five seeds and of halves of two, at 1 / seeds = 0."""
    a, b = np.random.default_rng(0).standard_normal((2, 6, 5, 3))
    flat = [x.reshape(-1, 3) for x in (a, b)]
    halves = [frechet(a[:, s].reshape(-1, 3), b[:, s].reshape(-1, 3)) for s in ([0, 1], [2, 3])]
    slope, limit = np.polyfit([1 / 5, 1 / 2], [frechet(*flat), np.mean(halves)], 1)
    assert slope > 0 and frechet_limit(a, b) == pytest.approx(limit)
    with pytest.raises(InputError, match="found 2 pictures of 3 features"):
        frechet_limit(a[:1], b[:1])
