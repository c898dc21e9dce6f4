"""LoRA out of a difference: the best of its rank, and what it leaves out."""

import math
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.formats.lora_extract import ROUNDING, extract_difference
from gadjax.formats.lora_names import layers_of
from gadjax.formats.state_dict import tensors_from_params
from gadjax.models.params import flatten, unflatten

RANK = 3


@pytest.fixture(scope="module")
def network(folders):
    folder = read_pipeline(folders("sd15"))
    return folder.components["unet"]


def changed(part, change):
    """The network with `change(path, array, generator)` added to every parameter."""
    rng = np.random.default_rng(1)
    flat = {k: x + change(k, x, rng).astype(x.dtype) for k, x in flatten(part.params).items()}
    return replace(part, params=unflatten(flat))


def low_rank(path, x, rng):
    """A random difference of rank 2, as a matrix [inputs and taps, out] of each layer."""
    if path not in {layer.path for layer in LAYERS.values()}:
        return np.zeros_like(x)
    a = rng.normal(size=(math.prod(x.shape[:-1]), 2))
    return (a @ rng.normal(size=(2, x.shape[-1]))).reshape(x.shape) * 0.1


@pytest.fixture(scope="module", autouse=True)
def layers(network):
    global LAYERS
    LAYERS = layers_of(network)


def deltas(before, after):
    a, b = (dict(tensors_from_params(part.params, part.keymap)) for part in (before, after))
    return {k.removesuffix(".weight"): b[k] - a[k] for k in a}


def product(pair):
    a, b = pair
    whole = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
    return whole.reshape(len(b), *a.shape[1:])


def test_a_difference_of_low_rank_comes_back(network):
    """Layers of U-Net, linear and convolutions, at their rank exactly."""
    after = changed(network, low_rank)
    result = extract_difference(network, after, RANK, None)
    expected = deltas(network, after)
    assert result.pairs.keys() == LAYERS.keys() and not result.left_out
    assert result.rank == RANK and {len(a) for a, _ in result.pairs.values()} == {RANK}
    for module, pair in result.pairs.items():
        np.testing.assert_allclose(product(pair), expected[module], atol=1e-5, err_msg=module)
        # Both factors are of one size.
        a, b = pair
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=1e-4)
    assert result.error < 1e-5


def test_it_is_the_best_of_its_rank(network):
    """Singular values of the float64 difference: what is left, by layer and together."""
    after = changed(network, lambda path, x, rng: 0.1 * rng.normal(size=x.shape))
    result = extract_difference(network, after, RANK, None)
    expected = deltas(network, after)
    rest = total = 0
    for e in result.layers:
        delta = expected[e.module].reshape(len(expected[e.module]), -1).astype(np.float64)
        values = np.linalg.svd(delta, compute_uv=False)
        error = np.linalg.norm(values[RANK:])
        assert e.size == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert e.error * e.size == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert np.linalg.norm(delta - product(result.pairs[e.module]).reshape(delta.shape)) == (
            pytest.approx(error, rel=1e-4, abs=1e-5)
        )
        rest, total = rest + error**2, total + (delta**2).sum()
    others = {k: v for k, v in expected.items() if k not in result.pairs}
    size = sum(float((v.astype(np.float64) ** 2).sum()) for v in others.values())
    assert sum(x**2 for x in result.left_out.values()) == pytest.approx(size, rel=1e-5)
    assert result.error == pytest.approx(math.sqrt((rest + size) / (total + size)), rel=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_the_smallest_rank_that_keeps_an_energy(network, energy):
    after = changed(
        network, lambda path, x, rng: 0.1 * rng.normal(size=x.shape) * path.endswith("kernel")
    )
    result = extract_difference(network, after, None, energy)
    results = result, extract_difference(network, after, result.rank - 1, None)
    kept = [
        1 - sum((e.size * e.error) ** 2 for e in r.layers) / sum(e.size**2 for e in r.layers)
        for r in results
    ]
    assert kept[0] >= energy - 1e-6 > kept[1]


def test_equal_networks_are_refused(network):
    with pytest.raises(InputError, match="found no kernel unlike that in"):
        extract_difference(network, network, RANK, None)


def test_rounding_is_told_from_training(network):
    """A difference that is bfloat16's rounding has no singular value above its estimate."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(512, 512)).astype(np.float32)
    rounded = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    rms = np.sqrt(np.mean((rounded - weight) ** 2)) / np.sqrt(np.mean(weight**2))
    assert rms == pytest.approx(ROUNDING * 2.0**-7, rel=0.05)
    half = lambda part: replace(  # noqa: E731
        part, params=jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), part.params)
    )
    after = changed(network, lambda path, x, rng: 1e-4 * rng.normal(size=x.shape))
    result = extract_difference(half(network), half(after), RANK, None)
    assert all(e.noise > 0 for e in result.layers)
    full = extract_difference(network, changed(network, low_rank), RANK, None)
    assert all(e.noise < 1e-4 for e in full.layers)
