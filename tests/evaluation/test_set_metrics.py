"""Distances between sets of features, in cases whose values are known."""

import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.evaluation import set_metrics
from gadjax.evaluation.frechet import frechet
from gadjax.evaluation.seed_probe import low_pass, seed_probe
from gadjax.evaluation.set_metrics import cmmd, kid, mmd, support_overlap
from gadjax.features.diversity import cosine_diversity, effective_number, vendi


def normal(count, width, seed=0, mean=0.0, scale=1.0):
    return mean + scale * np.random.default_rng(seed).standard_normal((count, width))


def features_of(kernel):
    """Vectors of length 1 with these cosines."""
    values, vectors = np.linalg.eigh(np.asarray(kernel, float))
    return vectors * np.sqrt(np.maximum(values, 0))


def test_kernel_distance_is_its_formula():
    a, b = normal(7, 3), normal(9, 3, seed=1)
    within_a = [(x @ y / 3 + 1) ** 3 for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    within_b = [(x @ y / 3 + 1) ** 3 for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
    between = [(x @ y / 3 + 1) ** 3 for x in a for y in b]
    expected = np.mean(within_a) + np.mean(within_b) - 2 * np.mean(between)
    kernel = lambda x, y: (x @ y.T / 3 + 1) ** 3  # noqa: E731
    np.testing.assert_allclose(mmd(a, b, kernel), expected)
    np.testing.assert_allclose(kid(a, b[:7]), mmd(a, b[:7], kernel))


def test_blocks_do_not_matter(monkeypatch):
    a, b = normal(23, 4), normal(23, 4, seed=1)
    first = kid(a, b), cmmd(a, b), cmmd(a, b, unbiased=False), *support_overlap(a, b)
    monkeypatch.setattr(set_metrics, "BLOCK", 5)
    again = kid(a, b), cmmd(a, b), cmmd(a, b, unbiased=False), *support_overlap(a, b)
    np.testing.assert_allclose(first, again, atol=1e-9)


def test_kernel_distances_are_unbiased():
    """Of two draws of one law they are zero in the mean, of either sign."""
    for distance in (kid, cmmd):
        values = [
            distance(normal(20, 4, seed=2 * i, mean=1), normal(20, 4, seed=2 * i + 1, mean=1))
            for i in range(200)
        ]
        standard_error = np.std(values) / 200**0.5
        assert abs(np.mean(values)) < 3.5 * standard_error
        assert min(values) < 0 < max(values)


def test_subsets_of_many_pictures(monkeypatch):
    """Each has another size, so that the value is no single one of theirs."""
    monkeypatch.setattr(set_metrics, "SUBSET", 30)
    a, b = normal(60, 4), normal(80, 4, seed=1, mean=0.3)
    kernel = lambda x, y: (x @ y.T / 4 + 1) ** 3  # noqa: E731
    assert kid(a, b) == pytest.approx(mmd(a, b, kernel), rel=0.2)
    assert kid(a, b) == kid(a, b)


def test_cmmd_by_hand():
    """Two points each at right angles: squared distances 0 and 2."""
    a, b = np.array([[3.0, 0], [2, 0]]), np.array([[0, 1.0], [0, 5]])
    expected = 1000 * (2 - 2 * np.exp(-2 / 200))
    assert cmmd(a, b) == pytest.approx(expected)
    assert cmmd(a, b, unbiased=False) == pytest.approx(expected)
    spread = features_of([[1, 0.5], [0.5, 1]])
    # Diagonal of 1 against exp(-1 / 200) off it.
    off = np.exp(-1 / 200)
    assert cmmd(spread, spread) == pytest.approx(1000 * (2 * off - (1 + off)), abs=1e-9)
    assert cmmd(spread, spread, unbiased=False) == pytest.approx(0, abs=1e-9)


def test_overlap_of_supports_by_hand():
    """On a line with one neighbour: radii of 0, 1, 3 are 1, 1, 2; of 0.5, 2.5, 9 are 2, 2, 6.5."""
    real, fake = np.array([[0.0], [1], [3]]), np.array([[0.5], [2.5], [9]])
    overlap = support_overlap(real, fake, neighbours=1)
    # 0.5 lies in two balls of the reference (of 0 and 1), 2.5 in that of 3, 9 in none.
    assert overlap.precision == pytest.approx(2 / 3)
    assert overlap.density == pytest.approx((2 + 1 + 0) / 3)
    # Balls of the samples: (-1.5, 2.5), (0.5, 4.5), (2.5, 15.5) hold all of 0, 1, 3.
    assert overlap.recall == 1.0
    # Within the radius of 0 and 1 lies 0.5, within that of 3 lies 2.5.
    assert overlap.coverage == 1.0
    far = support_overlap(real, fake + 100, neighbours=1)
    assert far.precision == far.density == far.coverage == 0
    with pytest.raises(InputError, match="expected more than 3 neighbours"):
        support_overlap(real, fake, neighbours=3)


def test_frechet_floor_falls_as_one_over_n():
    """Of one law: half of it with twice the pictures."""
    floors = [
        np.mean([frechet(normal(n, 8, seed=i), normal(n, 8, seed=100 + i)) for i in range(10)])
        for n in (200, 400, 800)
    ]
    np.testing.assert_allclose(floors[0] / floors[1], 2, rtol=0.2)
    np.testing.assert_allclose(floors[1] / floors[2], 2, rtol=0.2)


def test_vendi_and_effective_number_in_closed_form():
    kernel = [[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]]
    x = features_of(kernel)[None]
    assert vendi(x)[0] == pytest.approx(2.1573, abs=1e-4)
    assert cosine_diversity(x)[0] == pytest.approx(1 - 0.9 / 3)
    assert effective_number(x)[0] == pytest.approx(1 / (0.81 / 3))
    alike = np.ones((1, 5, 4))
    assert cosine_diversity(alike)[0] == pytest.approx(0, abs=1e-12)
    assert effective_number(alike)[0] == pytest.approx(1)


def test_cosine_diversity_does_not_depend_on_the_seeds():
    """Its mean of 4 seeds is that of 16."""
    x = normal(3000 * 16, 12, mean=0.5).reshape(3000, 16, 12)
    many, few = cosine_diversity(x), cosine_diversity(x[:, :4])
    error = np.hypot(many.std(), few.std()) / 3000**0.5
    assert abs(many.mean() - few.mean()) < 3 * error
    assert abs(vendi(x).mean() - vendi(x[:, :4]).mean()) > 1


def test_seed_probe():
    """Noise that shows in the pictures is named, of a model that ignores it only by chance."""
    rng = np.random.default_rng(0)
    prompts, seeds, width = 32, 8, 10
    prompt = 5 * rng.standard_normal((prompts, 1, width))
    noise = rng.standard_normal((1, seeds, width))
    teacher = prompt + noise + 0.3 * rng.standard_normal((prompts, seeds, width))
    student = prompt + 0.7 * noise + 0.3 * rng.standard_normal((prompts, seeds, width))
    deaf = prompt + rng.standard_normal((prompts, seeds, width))
    assert seed_probe(teacher, teacher).mean() > 0.97
    assert seed_probe(teacher, student).mean() > 0.9
    chance = 1 / seeds
    for values in (seed_probe(deaf, deaf), seed_probe(teacher, deaf)):
        assert abs(values.mean() - chance) < 4 * (chance / (prompts * seeds)) ** 0.5
    # A student that swaps two noises names itself as well, and misses two of the teacher's.
    order = [1, 0, *range(2, seeds)]
    swapped = student[:, order]
    assert seed_probe(swapped, swapped).mean() > 0.9
    assert seed_probe(teacher, swapped).mean() == pytest.approx(0.75, abs=0.08)


def test_low_pass_is_the_mean_of_blocks():
    x = np.random.default_rng(0).standard_normal((2, 32, 64, 3)).astype(np.float32)
    blocks = x.reshape(2, 16, 2, 16, 4, 3).mean((2, 4)).reshape(2, -1)
    np.testing.assert_allclose(low_pass(x), blocks, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(low_pass(x[:, :8, :8]), x[:, :8, :8].reshape(2, -1))
    odd = x[:, :17, :1]  # the last of 16 blocks has two rows
    assert low_pass(odd).reshape(2, 16, 3)[0, -1] == pytest.approx(odd[0, 15:, 0].mean(0))
