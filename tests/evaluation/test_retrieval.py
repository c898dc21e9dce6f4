"""Noise retrieval against brute force and where the answer is known."""

import numpy as np
import pytest

from gadjax.evaluation.retrieval import retrieval

WORDS = np.array(["", "left", "right", "top"])
OPEN = np.array([[True, True], [True, False], [False, True]])


def library(seed, noises=40):
    return WORDS[np.random.default_rng(seed).integers(0, 4, (3, noises, 2))]


def brute(row, teacher, attributes):
    """Retrieval and chance, query by query."""
    hits, queries, chance = 0, 0, 0.0
    for c in range(3):
        for a in attributes:
            if not OPEN[c, a]:
                continue
            for word in WORDS[1:]:
                selected = [i for i, words in enumerate(teacher[c]) if words[a] == word]
                hits += sum(row[c, i, a] == word for i in selected)
                queries += len(selected)
                for i in selected:
                    others = np.delete(row[c, :, a], i)
                    chance += np.mean(others == word)
    return hits / queries, chance / queries


@pytest.mark.parametrize("attributes", [[0, 1], [0], [1]])
def test_against_brute_force(attributes):
    row, teacher = library(0), library(1)
    row[:, :20] = teacher[:, :20]
    rate, chance = retrieval(row, teacher, OPEN, attributes)
    np.testing.assert_allclose((rate.value, chance.value), brute(row, teacher, attributes))
    for found in (rate, chance):
        assert found.low < found.value < found.high


def test_a_student_that_is_its_teacher():
    teacher = library(2)
    rate, chance = retrieval(teacher, teacher, OPEN, [0, 1])
    assert rate == (1, 1, 1)
    assert chance.value < 0.4


def test_permuted_noises_are_at_chance():
    """Independent words of known frequencies: chance is the sum of their squares."""
    rng = np.random.default_rng(3)
    teacher = WORDS[rng.choice(4, (3, 800, 2), p=[0.1, 0.6, 0.2, 0.1])]
    row = teacher[:, rng.permutation(800)]
    rate, chance = retrieval(row, teacher, OPEN, [0, 1])
    assert rate.value == pytest.approx(chance.value, abs=0.04)
    # The empty word (a tenth) is never a query and never a hit.
    assert chance.value == pytest.approx((0.36 + 0.04 + 0.01) / 0.9, abs=0.03)


def test_noises_are_resampled_and_not_pictures():
    """Equal captions add no certainty."""
    rng = np.random.default_rng(4)
    teacher, row = (WORDS[rng.integers(1, 3, (1, 100, 1))] for _ in range(2))
    one = retrieval(row, teacher, np.ones((1, 1), bool), [0])
    many = retrieval(*(x.repeat(9, 0) for x in (row, teacher)), np.ones((9, 1), bool), [0])
    np.testing.assert_allclose(many, one)
    assert 0.15 < one[0].high - one[0].low < 0.25  # 2 x 1.96 x 0.5 / sqrt(100)


def test_a_teacher_that_draws_nothing():
    assert retrieval(library(0), np.full((3, 40, 2), ""), OPEN, [0, 1]) is None
