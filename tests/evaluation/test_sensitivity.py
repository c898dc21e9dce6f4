"""Noise sensitivity: tangents of the map from noise to x0, and their comparison."""

import jax
import numpy as np
import pytest

from gadjax.evaluation.sensitivity import compare_tangents, map_tangents
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.models.params import cast
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.pipelines.sampling import clean_latent, map_prompts

PROMPTS = ["red circle", "a blue square above", ""]


def test_a_map_against_itself_and_others():
    v = np.random.default_rng(0).standard_normal((200, 6))
    jacobian = np.random.default_rng(1).standard_normal((6, 6))
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))[0]
    expected = v @ jacobian
    np.testing.assert_allclose(compare_tangents(expected, expected), 1)
    cosine, size = compare_tangents(expected @ turn, expected)
    np.testing.assert_allclose(size, 1)  # a rotation keeps lengths
    assert abs(cosine.mean()) < 0.5
    cosine, size = compare_tangents(-0.3 * expected, expected)
    np.testing.assert_allclose(cosine, -1)
    np.testing.assert_allclose(size, 0.3)


def test_a_map_that_ignores_the_noise():
    cosine, size = compare_tangents(np.zeros((2, 3)), np.ones((2, 3)))
    np.testing.assert_array_equal([cosine, size], 0)


@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(3, None, 2.5, 6), SamplingConfig(2, (899.0, 449.0), 1.0, 6)],
    ids=["teacher", "student"],
)
def test_tangents_are_derivatives(tiny_pipeline, sampling):
    """Central differences in float64: error O(h^2), measured 1e-8 and below."""
    with jax.enable_x64(True):
        pipeline, params = load_pipeline(tiny_pipeline, dtype=np.float64)
        params = cast(params, np.float64)
        rng = np.random.default_rng(0)
        z, v = rng.standard_normal((2, len(PROMPTS), *pipeline.latent))

        def x0(params, z, cond, null):
            return clean_latent(pipeline, params["transformer"], sampling, z, cond, null)

        model = Model("model", pipeline, params, sampling)
        found = map_tangents(model, PROMPTS, z, v, batch=3)
        h = 1e-4
        ends = map_prompts(x0, model, PROMPTS * 2, (np.concatenate([z + h * v, z - h * v]),))
        expected = (ends[:3] - ends[3:]) / (2 * h)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    assert np.abs(expected).max() > 1e-3
