"""Noises of strips: ends, norms, and the direction at the middle."""

import numpy as np

from gadjax.evaluation.strips import POINTS, WAYS, as_strips, strip_prompts, strip_set
from gadjax.pipelines.sampling import initial_noise

LATENT = (4, 6, 3)


def test_prompts_are_spread_over_the_list():
    assert strip_prompts(64, 4) == [0, 21, 42, 63]
    assert strip_prompts(3, 4) == [0, 1, 2] and strip_prompts(1, 4) == [0]


def test_ways_of_a_noise():
    prompts = ["a", "b", "c"]
    texts, noises = strip_set(prompts, [0, 2], LATENT, 7)
    assert texts == ["a"] * 18 + ["c"] * 18
    ways = as_strips(noises)
    assert ways.shape == (2, len(WAYS), POINTS, *LATENT)
    z, other, v = (initial_noise(seed, 3, LATENT).astype(np.float64) for seed in (0, 1, 7))
    for k, p in enumerate([0, 2]):
        path, direction = ways[k].astype(np.float64)
        np.testing.assert_allclose(path[[0, -1]], [z[p], other[p]], atol=1e-6)
        np.testing.assert_allclose(direction[POINTS // 2], z[p], atol=1e-6)
        # To first order the noise moves along v.
        change = direction[POINTS // 2 + 1] - direction[POINTS // 2 - 1]
        cosine = (change * v[p]).sum() / np.linalg.norm(change) / np.linalg.norm(v[p])
        assert cosine > 1 - 1e-9
