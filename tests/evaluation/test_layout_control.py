"""Layout control: Polyak descent on the noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.evaluation.layout_control import (
    MAX_STEP,
    SNAPSHOT_STEPS,
    PixelTargets,
    angles_degrees,
    polyak_descent,
    polyak_step,
)
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.pipelines.sampling import clean_latent, draw, initial_noise, map_prompts

PROMPTS = ["red circle", "blue square", "green"]


def norms(z):
    return np.linalg.norm(np.asarray(z).reshape(len(z), -1), axis=1)


@pytest.fixture(scope="module")
def z():
    return np.random.default_rng(0).standard_normal((3, 4, 4, 2)).astype(np.float32)


def test_a_step_is_polyak_s_up_to_a_cap_and_stays_on_the_sphere(z):
    g = np.random.default_rng(1).standard_normal(z.shape).astype(np.float32)
    g -= z * ((g * z).sum((1, 2, 3)) / (z**2).sum((1, 2, 3)))[:, None, None, None]
    distance = np.array([0.0, 0.3, 1e6]).astype(np.float32)
    stepped = polyak_step(jnp.array(z), jnp.array(g), jnp.array(distance))
    np.testing.assert_allclose(norms(stepped), norms(z), rtol=1e-6)
    # g is tangent to the sphere: the angle's tangent is the length of the step over |z|.
    reach = [0, 0.3 / norms(g)[1] / norms(z)[1], MAX_STEP]
    np.testing.assert_allclose(np.tan(np.radians(angles_degrees(z, stepped))), reach, atol=1e-3)
    assert np.sum((np.asarray(stepped) - z)[1] * g[1]) < 0


def test_no_slope_no_step(z):
    stepped = polyak_step(jnp.array(z), jnp.zeros(z.shape), jnp.ones(3))
    np.testing.assert_allclose(stepped, z, rtol=1e-6)


def test_angles():
    a = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    b = np.array([[2.0, 0.0], [0.0, 3.0], [-1.0, -1.0]])
    np.testing.assert_allclose(angles_degrees(a, b), [0, 90, 180], atol=1e-6)


def brightness(image_HWC, place_2):
    """Differentiable distance in place of a layout's: squared error of the mean brightness."""
    return (100 * (image_HWC.mean() - place_2[0])) ** 2


@pytest.mark.slow
def test_descent_against_steps_computed_by_hand(tiny_pipeline):
    """Random network, a batch that has to be padded, reference gradients without remat."""
    pipeline, params = load_pipeline(tiny_pipeline)
    sampling = SamplingConfig(2, None, 2.0, 6)
    model = Model("model", pipeline, params, sampling)
    z = initial_noise(0, 3, pipeline.latent)
    places = np.float32([[0.1, 0.0], [-0.2, 0.0], [0.3, 0.0]])
    noises, images = polyak_descent(model, PROMPTS, z, PixelTargets(places, brightness), batch=2)
    assert noises.shape == (3, len(SNAPSHOT_STEPS), *pipeline.latent)
    np.testing.assert_array_equal(noises[:, 0], z)
    for r in range(len(SNAPSHOT_STEPS)):
        np.testing.assert_allclose(norms(noises[:, r]), norms(z), rtol=1e-5)

    def step(params, z, places, cond, null):
        def distances(z):
            x0 = clean_latent(pipeline, params["transformer"], sampling, z, cond, null)
            return jax.vmap(brightness)(pipeline.decode(params["vae"], x0), places)

        value, pull = jax.vjp(distances, z)
        return polyak_step(z, pull(jnp.ones(len(z)))[0], value)

    def run(z):
        return map_prompts(step, model, PROMPTS, (z, places), batch=3)

    by_hand = run(run(z))
    np.testing.assert_allclose(noises[:, SNAPSHOT_STEPS.index(2)], by_hand, atol=1e-3)
    for r in (0, -1):
        alone = draw(model, PROMPTS, noises[:, r])
        np.testing.assert_allclose(images[:, r], alone, atol=1e-5)
    off = [
        np.square(100 * (x.mean((1, 2, 3)) - places[:, 0])) for x in (images[:, 0], images[:, -1])
    ]
    assert np.all(off[1] < 0.5 * off[0])
