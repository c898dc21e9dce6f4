"""Functions of a pipeline folder; its networks have their own tests."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import edit

from gadjax.errors import InputError
from gadjax.pipelines.pipeline import (
    abstract_pipeline,
    floor_timesteps,
    load_pipeline,
    resized,
)


def test_floored_timesteps_keep_the_derivative_in_time():
    def network(params, x, t, cond):
        return params * x * jnp.sin(t / 20)[:, None]

    x, t = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([749.25, 3.9])
    output, moved = jax.jvp(
        lambda t: floor_timesteps(network)(2.0, x, t, None), (t,), (jnp.array([1.0, -1.0]),)
    )
    floored = np.array([[749], [3]])
    np.testing.assert_allclose(output, 2 * x * np.sin(floored / 20), rtol=1e-5)
    expected = 2 * x * np.cos(floored / 20) / 20 * np.array([[1], [-1]])
    np.testing.assert_allclose(moved, expected, rtol=1e-5)


@pytest.mark.parametrize("flow", [False, True])
def test_only_a_dpm_flow_floors_timesteps(tiny_pipeline, tmp_path, flow):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    if flow:
        settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        edit(folder / "scheduler" / "scheduler_config.json", **settings)
    pipeline, params = load_pipeline(folder)
    cond = pipeline.cond(jnp.ones((1, 3, 20)), jnp.ones((1, 3), jnp.int32))
    raw = jax.jit(lambda x, t: pipeline.denoiser.raw(params["transformer"], x, t, cond))
    x = jnp.ones((1, *pipeline.latent))
    assert bool(jnp.all(raw(x, 749.25) == raw(x, 749.0))) == flow
    # The schedule's sigma is that of the time itself.
    alpha, sigma = pipeline.denoiser.schedule.alpha_sigma(jnp.float32(749.25))
    assert not flow or (float(alpha), float(sigma)) == pytest.approx((0.25075, 0.74925))


def test_a_size_is_checked_with_the_length_that_is_drawn(folders):
    """Not with the family's 512 tokens, for which the tiny network has no positions."""
    pipeline, _ = abstract_pipeline(folders("z_image"))
    assert resized(pipeline, (24, 40), length=40).latent == (12, 20, 8)
    with pytest.raises(InputError, match="size: found 24x40 pixels; length: found 512 tokens"):
        resized(pipeline, (24, 40))
