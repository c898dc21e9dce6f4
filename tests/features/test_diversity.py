"""Diversity and seed alignment against known values."""

import numpy as np
import pytest

from gadjax.features.diversity import (
    coverage,
    pairwise_distance,
    seed_alignment,
    vendi,
    vendi_corrected,
)


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((5, 8, 12)).astype(np.float32)


def test_vendi_counts_different_pictures():
    alike = np.tile(np.random.default_rng(0).standard_normal(9), (1, 6, 1))
    apart = np.eye(9)[None, :6] * np.arange(1, 7)[:, None]
    halves = np.repeat(np.eye(9)[:2], 3, axis=0)[None]
    np.testing.assert_allclose(vendi(alike), 1, atol=1e-9)
    np.testing.assert_allclose(vendi(apart), 6)
    np.testing.assert_allclose(vendi(halves), 2)


def test_vendi_by_hand():
    """Two pictures of cosine c: eigenvalues (1 + c) / 2 and (1 - c) / 2."""
    cosine = 0.6
    values = np.array([1 + cosine, 1 - cosine]) / 2
    found = vendi(np.array([[[1.0, 0.0], [cosine, 0.8]]]))
    np.testing.assert_allclose(found, np.exp(-(values * np.log(values)).sum()))


def test_vendi_does_not_depend_on_order_or_size(x):
    np.testing.assert_allclose(vendi(3 * x[:, ::-1]), vendi(x), rtol=1e-6)
    assert np.all((vendi(x) > 1) & (vendi(x) < 8))


def test_corrected_vendi_is_nearer_to_that_of_many_seeds():
    """Four orthogonal pictures, equally likely: 4; of eight seeds the score itself is less."""
    rng = np.random.default_rng(0)
    few = np.eye(4)[rng.integers(0, 4, (500, 8))]
    plain, corrected = (np.log(f(few)).mean() for f in (vendi, vendi_corrected))
    assert np.log(4) - plain > 0.15
    assert abs(np.log(4) - corrected) < 0.25 * (np.log(4) - plain)
    # Of all seeds alike nothing is to be corrected.
    np.testing.assert_allclose(vendi_corrected(few[:, :1].repeat(8, axis=1)), 1, atol=1e-6)


def test_vendi_rises_with_the_seeds(x):
    """The entropy of all seeds is no less than the mean of those without one: a lower bound."""
    without = [np.log(vendi(np.delete(x, s, axis=1))) for s in range(8)]
    assert (np.log(vendi(x)) >= np.mean(without, axis=0)).all()
    expected = np.exp(8 * np.log(vendi(x)) - 7 * np.mean(without, axis=0))
    np.testing.assert_allclose(vendi_corrected(x), expected)


def test_pairwise_distance(x):
    pairs = [(i, j) for i in range(8) for j in range(i)]
    by_hand = [np.mean([np.sqrt(((p[i] - p[j]) ** 2).mean()) for i, j in pairs]) for p in x]
    np.testing.assert_allclose(pairwise_distance(x), by_hand, rtol=1e-5)
    np.testing.assert_array_equal(pairwise_distance(np.repeat(x[:, :1], 3, axis=1)), 0)


def test_alignment_of_the_same_pictures(x):
    np.testing.assert_array_equal(seed_alignment(x, x), 1)
    np.testing.assert_array_equal(seed_alignment(x + 0.01, x), 1)


def test_alignment_of_shuffled_pictures():
    rng = np.random.default_rng(1)
    teacher = rng.standard_normal((400, 8, 6))
    np.testing.assert_array_equal(seed_alignment(np.roll(teacher, 1, axis=1), teacher), 0)
    shuffled = rng.permuted(teacher, axis=1)
    other = rng.standard_normal(teacher.shape)
    for student in (shuffled[:, :, [3, 4, 5, 0, 1, 2]], other):
        assert seed_alignment(student, teacher).mean() == pytest.approx(1 / 8, abs=0.02)


def test_a_collapsed_student_is_at_chance(x):
    one = np.repeat(x[:, :1], 8, axis=1)
    np.testing.assert_allclose(seed_alignment(one, x), 1 / 8)
    np.testing.assert_allclose(seed_alignment(x, one), 1 / 8)


def test_coverage_counts_words_of_open_attributes():
    words = np.array([[["a", "x"], ["a", "y"], ["", ""]], [["a", "x"], ["b", "x"], ["c", "x"]]])
    both = np.ones((2, 2), bool)
    np.testing.assert_allclose(coverage(words, both), [(1 + 2) / 2, (3 + 1) / 2])
    np.testing.assert_allclose(coverage(words, both & [[False], [True]] & [True, False]), [3])
