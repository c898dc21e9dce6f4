"""Sampling: images equal diffusers', for any batch size."""

from dataclasses import replace
from unittest.mock import patch

import jax
import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.pipelines.sampling import (
    PROGRAMS,
    _programs,
    compile_once,
    draw,
    initial_noise,
    sampler_and_times,
)

PROMPTS = ["red circle", "a blue square above", "green"]
LENGTH = 8


@pytest.fixture(scope="module")
def loaded(tiny_pipeline):
    return load_pipeline(tiny_pipeline)


def theirs(pipe, noise, sampling):
    import torch

    steps = {"num_inference_steps": sampling.steps, "timesteps": sampling.timesteps}
    return pipe(
        PROMPTS,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        guidance_scale=sampling.guidance,
        height=16,
        width=16,
        max_sequence_length=LENGTH,
        clean_caption=False,
        use_resolution_binning=False,
        output_type="np",
        **{key: value for key, value in steps.items() if value is not None},
    ).images


def test_teacher_samples_equal_diffusers(torch_pipeline, loaded):
    pipeline, params = loaded
    noise = initial_noise(0, 3, pipeline.latent)
    sampling = SamplingConfig(5, None, 3.0, LENGTH)
    ours = draw(Model("model", pipeline, params, sampling), PROMPTS, noise)
    torch_pipeline.set_progress_bar_config(disable=True)
    expected = 2 * theirs(torch_pipeline, noise, sampling) - 1
    assert expected.std() > 0.1
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_student_samples_equal_diffusers(torch_pipeline, loaded):
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    from gadjax.formats.scheduler_config import student_scheduler_config

    pipeline, params = loaded
    config = student_scheduler_config(pipeline.folder.scheduler, (899, 674, 300))
    pipe = PixArtAlphaPipeline(
        **{
            **torch_pipeline.components,
            "scheduler": DPMSolverMultistepScheduler.from_config(config),
        }
    )
    pipe.set_progress_bar_config(disable=True)
    noise = initial_noise(0, 3, pipeline.latent)
    sampling = SamplingConfig(3, (899, 674, 300), 1.0, LENGTH)
    ours = draw(Model("model", pipeline, params, sampling), PROMPTS, noise)
    np.testing.assert_allclose(ours, 2 * theirs(pipe, noise, sampling) - 1, atol=2e-5)


def test_batches_make_no_difference(loaded):
    pipeline, params = loaded
    noise = initial_noise(3, 3, pipeline.latent)
    done = []
    model = Model("model", pipeline, params, SamplingConfig(2, None, 2.0, LENGTH))
    images = draw(model, PROMPTS, noise)
    parts = draw(model, PROMPTS, noise, batch=2, progress=done.append)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.float32
    assert np.abs(images).max() <= 1
    np.testing.assert_allclose(parts, images, atol=1e-5)
    assert done == [2, 1]


def test_models_of_one_network_share_a_program(loaded, tiny_pipeline):
    """Also where each was loaded by itself; pictures are those of a program of their own."""
    sampling = SamplingConfig(1, None, 1.0, LENGTH)
    pipeline, params = load_pipeline(tiny_pipeline)
    params = params | {pipeline.backbone: jax.tree.map(lambda x: 1.1 * x, params["transformer"])}
    first, second = Model("a", *loaded, sampling), Model("b", pipeline, params, sampling)
    noise = initial_noise(5, 3, pipeline.latent)
    _programs.clear()
    with patch.object(
        jax.stages.Lowered, "compile", autospec=True, side_effect=jax.stages.Lowered.compile
    ) as compiled:
        pictures = [draw(model, PROMPTS, noise) for model in (first, second)]
        assert compiled.call_count == 1
        draw(replace(first, sampling=replace(sampling, guidance=3.0)), PROMPTS, noise)
        assert compiled.call_count == 2
        _programs.clear()
        np.testing.assert_array_equal(draw(second, PROMPTS, noise), pictures[1])
        assert compiled.call_count == 3
    assert np.abs(pictures[1] - pictures[0]).max() > 1e-3
    for count in range(2 * PROGRAMS):
        compile_once(jax.jit(lambda x, n=count: x + n).lower(0.0))
    assert len(_programs) == PROGRAMS


def test_noise_is_a_function_of_seed_and_index():
    few, many = initial_noise(5, 2, (4, 6, 3)), initial_noise(5, 7, (4, 6, 3))
    assert many.shape == (7, 4, 6, 3) and many.dtype == np.float32
    np.testing.assert_array_equal(few, many[:2])
    assert not np.any(initial_noise(6, 7, (4, 6, 3)) == many)
    assert abs(initial_noise(0, 64, (8, 8, 4)).std() - 1) < 0.02


def test_timesteps_use_a_sampler_of_order_one(loaded):
    pipeline, _ = loaded
    sampler, times = sampler_and_times(pipeline, SamplingConfig(2, (899.0, 449.0), 1.0, 16))
    assert sampler.order == 1 and times.tolist() == [899, 449, -1]
    sampler, times = sampler_and_times(pipeline, SamplingConfig(7))
    assert sampler.order == 2 and len(times) == 8
    with pytest.raises(InputError, match="timesteps"):
        sampler_and_times(pipeline, SamplingConfig(2, (1200.0, 449.0), 1.0, 16))
