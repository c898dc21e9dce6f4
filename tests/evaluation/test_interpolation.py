"""Spherical interpolation of noises, and the evenness of the pictures along it."""

import numpy as np
import pytest

from gadjax.evaluation.interpolation import largest_jump, path_steps, slerp


@pytest.fixture
def ends():
    return np.random.default_rng(0).standard_normal((2, 8, 8, 4))


def test_norms_are_kept_and_steps_are_even(ends):
    a, b = (x / np.linalg.norm(x) * 16 for x in ends)
    arc = slerp(a, b, 9)
    np.testing.assert_allclose(np.linalg.norm(arc.reshape(9, -1), axis=1), 16)
    np.testing.assert_allclose(arc[[0, -1]], [a, b])
    chords = np.linalg.norm(np.diff(arc.reshape(9, -1), axis=0), axis=1)
    angle = np.arccos((a * b).sum() / 256)
    np.testing.assert_allclose(chords, 2 * 16 * np.sin(angle / 16))


def test_between_noises_of_two_norms(ends):
    a, b = ends[0], 1.5 * ends[1]
    arc = slerp(a, b, 5)
    np.testing.assert_allclose(arc[[0, -1]], [a, b])
    sizes = np.linalg.norm(arc.reshape(5, -1), axis=1)
    np.testing.assert_allclose(sizes, np.linspace(sizes[0], sizes[-1], 5))


def test_a_quarter_of_a_circle_and_a_path_of_length_zero():
    arc = slerp(np.array([2.0, 0.0]), np.array([0.0, 2.0]), 3)
    np.testing.assert_allclose(arc, [[2, 0], [2**0.5, 2**0.5], [0, 2]], atol=1e-12)
    a = np.float32([[1.0, 2.0]])
    np.testing.assert_allclose(slerp(a, a, 4), [a] * 4, rtol=1e-6)
    assert slerp(a, a, 4).dtype == np.float32


def test_lengths_and_jumps_by_hand():
    even = np.arange(5.0)[:, None] * [3.0, 4.0]
    leap = np.array([[0, 0], [0, 0], [0, 6], [0, 6], [8, 6]], float)
    still = np.ones((5, 2))
    steps = path_steps(np.stack([even, leap, still]))
    half = 0.5**0.5  # the root mean square of (3, 4) is 5 / sqrt(2)
    np.testing.assert_allclose(steps.sum(1), [20 * half, 14 * half, 0])
    np.testing.assert_allclose(largest_jump(steps), [1 / 4, 8 / 14, 1 / 4])
