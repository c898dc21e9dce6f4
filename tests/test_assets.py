"""Bundled assets: teachers, prompts, launch scripts."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from gadjax.assets import resolve
from gadjax.data.prompts import read_prompts
from gadjax.formats.sampling_config import read_sampling
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.pipelines.sampling import draw, initial_noise
from gadjax.worlds import oracle, shapes

TEACHERS = [resolve(f"asset:{name}") for name in ("shapes_teacher", "shapes_flow_teacher")]


@pytest.fixture(scope="module", params=TEACHERS, ids=lambda path: path.name)
def teacher(request):
    pipeline, params = load_pipeline(request.param)
    return pipeline, params, read_sampling(request.param, pipeline.sampling)


@pytest.mark.parametrize("folder", TEACHERS, ids=lambda path: path.name)
def test_teacher_is_small_and_as_save_pretrained_writes(folder, tmp_path):
    from diffusers import PixArtAlphaPipeline

    files = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    assert sum(p.stat().st_size for p in files.values()) <= 8_000_000
    PixArtAlphaPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    written = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    assert set(files) - written == {Path("README.md"), Path("gadjax.json")}
    assert written <= set(files)
    for name in written:
        if name.suffix == ".safetensors":
            assert (tmp_path / name).read_bytes() == files[name].read_bytes()


@pytest.mark.parametrize("count", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_the_teacher_satisfies_the_oracle(teacher, count):
    pipeline, params, sampling = teacher
    prompts = shapes.full_prompts(count, seed=7)
    images = draw(
        Model("teacher", pipeline, params, sampling),
        prompts,
        initial_noise(7, count, pipeline.latent),
    )
    assert oracle.adherence(images, prompts).mean() >= 0.95


def test_diffusers_samples_the_same_images(teacher):
    import torch
    from diffusers import PixArtAlphaPipeline

    pipeline, params, sampling = teacher
    prompts = ["a large blue square at the top left on a grey background", "a shape"]
    noise = initial_noise(3, len(prompts), pipeline.latent)
    actual = draw(Model("teacher", pipeline, params, sampling), prompts, noise) / 2 + 0.5
    pipe = PixArtAlphaPipeline.from_pretrained(pipeline.folder.path)
    expected = pipe(
        prompts,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        use_resolution_binning=False,
        clean_caption=False,
        output_type="np",
    ).images
    assert np.abs(actual - expected).max() <= 2 / 255


@pytest.mark.parametrize("name", ["shapes_prompts", "shapes_test_prompts", "shapes_demo_prompts"])
def test_prompts_parse(name):
    for prompt in read_prompts(resolve(f"asset:{name}.txt")):
        shapes.parse(prompt)


@pytest.mark.parametrize("script", ["env", "quickstart", "test"])
def test_scripts_parse(script):
    path = Path(__file__).parents[1] / "launch" / f"{script}.sh"
    subprocess.run(["bash", "-n", path], check=True)
