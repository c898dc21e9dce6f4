"""An exported folder is a diffusers pipeline that draws what gadjax draws, or there is none."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import same, state
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from huggingface_hub import ModelCard
from workdirs import LENGTH, TIMESTEPS, make_workdir

from gadjax import load
from gadjax.cli.main import main
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.formats.sampling_config import SamplingConfig, read_sampling, read_world
from gadjax.pipelines import parity
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.pipelines.sampling import draw, initial_noise


def transformer(folder):
    return read_pipeline(folder, components=("transformer",)).components["transformer"].params


@pytest.fixture(scope="module")
def student(workdir, tmp_path_factory):
    """Folder that `gadjax export` writes for the workdir; read-only."""
    out = tmp_path_factory.mktemp("exports") / "student"
    assert main(["export", "--workdir", str(workdir), "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_the_weights_are_the_average(student, tiny_pipeline):
    expected = jax.tree.map(lambda x: jnp.asarray(x) * (1 - 0.02 * 2), transformer(tiny_pipeline))
    jax.tree.map(np.testing.assert_array_equal, transformer(student), expected)
    for name in ("vae", "text_encoder"):
        assert same(state(student, name), state(tiny_pipeline, name))


def test_gadjax_json_and_model_card(student, tiny_pipeline):
    config = json.loads((student / "gadjax.json").read_text())
    assert read_sampling(student, SamplingConfig()) == SamplingConfig(4, TIMESTEPS, 1.0, LENGTH)
    assert config["timesteps"] == list(TIMESTEPS)
    assert config["objective"] == {"dmd": {}, "gad": {"weight": 0.3, "steps": 4}}
    assert config["trained"] == {"steps": 2, "batch": 32, "weights": "ema"}
    assert config["teacher"]["name"] == "tiny" and config["teacher"]["guidance"] == 3.0
    assert 0 <= config["verified"]["max_difference"] <= 2 / 255

    card = ModelCard.load(student / "README.md")
    assert card.data.license == "unknown" and card.data.base_model == "tiny"
    assert "distillation" in card.data.tags and card.data.library_name == "diffusers"
    assert "1 dmd + 0.3 gad (steps 4)" in card.text and "drew the same" in card.text
    assert str(tiny_pipeline.parent) not in card.content


@pytest.mark.slow
def test_diffusers_draws_the_same_by_the_line_in_the_card(student):
    pipe = PixArtAlphaPipeline.from_pretrained(student, dtype=torch.float32)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert pipe.scheduler.config.solver_order == 1
    pipe.set_progress_bar_config(disable=True)
    noise = initial_noise(3, 1, (8, 8, 4))
    lines = (student / "README.md").read_text().splitlines()
    names = {"pipe": pipe, "prompt": "a blue circle"}
    names["latents"] = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    exec(next(line for line in lines if line.startswith("image = pipe(")), names)
    theirs = np.asarray(names["image"], np.float32) / 255
    pipeline, params = load_pipeline(student)
    sampling = read_sampling(student, pipeline.sampling)
    ours = draw(Model("student", pipeline, params, sampling), ["a blue circle"], noise)[0] / 2 + 0.5
    assert np.abs(ours - theirs).max() <= 2 / 255


def test_fingerprints_of_student_and_teacher_differ(student, workdir, tiny_pipeline):
    assert load(workdir).fingerprint == load(student).fingerprint
    assert load(workdir).fingerprint != load(tiny_pipeline).fingerprint


def test_samples_equal_those_of_the_workdir(student, workdir, prompts, tmp_path, gadjax):
    for model, name in ((workdir, "a"), (student, "b")):
        gadjax("sample", "--model", model, "--prompts", prompts, "--out", tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_weights_of_a_step_in_half_precision(workdir, tiny_pipeline, tmp_path, gadjax, monkeypatch):
    monkeypatch.setattr(parity, "missing", lambda: ["torch"])
    out = tmp_path / "student"
    flags = ("--no-ema", "--step", 1, "--dtype", "bfloat16")
    gadjax("export", "--workdir", workdir, "--out", out, *flags)
    theirs = jax.tree.map(
        lambda x: (jnp.asarray(x) + 0.01).astype(jnp.bfloat16), transformer(tiny_pipeline)
    )
    jax.tree.map(np.testing.assert_array_equal, transformer(out), theirs)
    trained = json.loads((out / "gadjax.json").read_text())["trained"]
    assert trained["steps"] == 1 and trained["weights"] == "student"


def test_a_teacher_keeps_its_scheduler(tiny_pipeline, tmp_path, gadjax):
    teacher = shutil.copytree(tiny_pipeline, tmp_path / "teacher")
    (teacher / "README.md").write_text("---\nlicense: openrail++\n---\n# A teacher\n")
    data = {"world": "gadjax.worlds.shapes", "length": LENGTH}
    settings = {"objective": {"denoising": {}}, "data": data, "guidance": 2.5}
    workdir = make_workdir(tmp_path / "run", teacher, **settings)
    out = tmp_path / "new"
    gadjax("export", "--workdir", workdir, "--out", out)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((teacher / name).read_text())
    assert read_sampling(out, SamplingConfig()) == SamplingConfig(20, None, 2.5, LENGTH)
    assert "timesteps" not in json.loads((out / "gadjax.json").read_text())
    assert read_world(out) == "shapes"
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "openrail++" and "distillation" not in card.data.tags
    assert "num_inference_steps=20, guidance_scale=2.5" in card.text


def test_nothing_is_written_if_images_differ_from_diffusers(workdir, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(parity, "PICTURE_BOUND", -1.0)
    out = tmp_path / "student"
    fails(["export", "--workdir", workdir, "--out", out], 3, "verification", out=out)

    def broken(*arguments):
        raise ValueError("no such\nlayer")

    monkeypatch.setattr(parity, "draw_in_diffusers", broken)
    fails(["export", "--workdir", workdir, "--out", out], 3, "diffusers: ValueError", out=out)


@pytest.mark.slow
def test_verified_later(workdir, tmp_path, gadjax, fails, monkeypatch):
    out = tmp_path / "student"
    with monkeypatch.context() as patch:
        patch.setattr(parity, "missing", lambda: ["torch"])
        output = gadjax("export", "--workdir", workdir, "--out", out)
        assert f"gadjax export --verify {out}" in output
        fails(["export", "--verify", out], 2, "--verify: found no torch", out=out)
    assert json.loads((out / "gadjax.json").read_text())["verified"] is None
    before = (out / "README.md").read_text()
    assert "Not verified" in before
    with monkeypatch.context() as patch:
        patch.setattr(parity, "PICTURE_BOUND", -1.0)
        fails(["export", "--verify", out], 3, "verification", out=out)
    assert (out / "README.md").read_text() == before

    gadjax("export", "--verify", out)
    assert json.loads((out / "gadjax.json").read_text())["verified"]["prompts"] == 3
    after = (out / "README.md").read_text()
    assert "Not verified" not in after and "drew the same" in after
    assert after.splitlines()[:-1] == before.splitlines()[:-1]
    fails(["export", "--verify", workdir], 2, "gadjax.json", out=out)
