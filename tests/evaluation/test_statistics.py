"""Intervals against published and simulated values."""

import numpy as np
import pytest

from gadjax.evaluation.statistics import (
    bootstrap,
    clustered_wilson,
    geometric_mean,
    mean,
    ratio,
    wilson,
)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson(hits, total, low, high):
    """The last row is the example of Newcombe (1998), Statistics in Medicine 17, 857."""
    found = wilson(hits, total)
    assert found.value == hits / total
    np.testing.assert_allclose([found.low, found.high], [low, high], atol=5e-5)


def test_bootstrap_has_the_width_of_the_standard_error():
    values = np.random.default_rng(0).standard_normal(400)
    found = mean(values)
    assert found.value == pytest.approx(values.mean())
    reach = 1.96 * values.std() / 20
    np.testing.assert_allclose(
        [found.low, found.high], [found.value - reach, found.value + reach], atol=0.01
    )
    assert mean(values) == found


def test_one_prompt_has_no_interval():
    assert bootstrap(lambda v: v.mean(-1), np.array([2.0])) == (2.0, None, None)


def test_a_ratio_resamples_both_sides_together():
    values = np.random.default_rng(0).uniform(1, 9, 30)
    np.testing.assert_allclose(ratio(0.5 * values, values), 0.5)


def test_a_ratio_with_zeros_in_the_denominator_is_finite():
    """Some of 2000 resamples of two prompts hold only the one that is zero."""
    found = ratio(np.array([1.0, 1.0]), np.array([0.0, 2.0]))
    assert found.value == 1 and np.isfinite(found).all()


def test_geometric_mean():
    assert geometric_mean(np.array([0.5, 2.0, 1.0])).value == pytest.approx(1)
    assert geometric_mean(np.array([0.0, 1.0])).value < 1e-100


def test_wilson_of_clusters():
    """Independent pictures count each; pictures that are alike within a prompt count once."""
    rng = np.random.default_rng(0)
    alike = np.repeat(rng.random((40, 1)) < 0.7, 8, axis=1)
    found, once = clustered_wilson(alike), wilson(int(alike[:, 0].sum()), 40)
    assert found.value == once.value
    # The variance between prompts is the unbiased one: 39 in place of 40 prompts.
    rate = alike.mean()
    np.testing.assert_allclose(found, wilson(rate * 39, 39), rtol=1e-12)
    free = rng.random((4000, 8)) < 0.7
    np.testing.assert_allclose(
        clustered_wilson(free), wilson(int(free.sum()), free.size), atol=1e-3
    )
    for rate in (0.0, 1.0):
        assert clustered_wilson(np.full((4, 3), rate)) == wilson(12 * rate, 12)
    assert clustered_wilson(np.array([[1, 0, 0]])) == wilson(1, 3)
