"""Students that diffusers draws by the number of their steps alone: in a flow, and of one step."""

import json

import diffusers
import numpy as np
import pytest
import torch
from tiny_run import config_file
from workdirs import LENGTH, make_workdir

from gadjax.formats.sampling_config import SamplingConfig, read_sampling
from gadjax.pipelines import parity
from gadjax.pipelines.diffusers_calls import diffusers_arguments
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.pipelines.sampling import draw, initial_noise

PROMPTS = ["a blue circle above", "red square", ""]
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
GRID = (999, 749.25, 499.5, 249.75)
DMD = {"dmd": {}}


@pytest.fixture(scope="module")
def flow_pipeline(torch_pipeline, tmp_path_factory):
    """The folder of `torch_pipeline` under the flow settings of its own scheduler."""
    folder = tmp_path_factory.mktemp("pipelines") / "flow"
    scheduler = diffusers.DPMSolverMultistepScheduler(flow_shift=1.0, **FLOW)
    parts = torch_pipeline.components | {"scheduler": scheduler}
    diffusers.PixArtAlphaPipeline(**parts).save_pretrained(folder)
    return folder


def difference(folder, sampling=None):
    """Between gadjax's and diffusers' pictures, from 0 to 1, from the same latents."""
    sampling = sampling or read_sampling(folder, SamplingConfig())
    pipeline, params = load_pipeline(folder)
    noise = initial_noise(7, len(PROMPTS), pipeline.latent)
    ours = draw(Model(folder.name, pipeline, params, sampling), PROMPTS, noise) / 2 + 0.5
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPTS,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
        **diffusers_arguments(type(pipe).__name__, sampling),
    ).images
    assert theirs.std() > 0.05
    return np.abs(ours - theirs).max()


@pytest.mark.parametrize("steps", [10, 3])
def test_a_flow_teacher_draws_as_diffusers_does(flow_pipeline, steps):
    pipeline, _ = load_pipeline(flow_pipeline)
    assert pipeline.sampler.order == 2
    assert difference(flow_pipeline, SamplingConfig(steps, None, 3.0, LENGTH)) <= 2e-5


@pytest.mark.parametrize(
    ("timesteps", "kind"),
    [(GRID, "PixArtAlphaPipeline"), ((999, 666, 333), "PixArtAlphaPipeline")]
    + [((999,), "PixArtSigmaPipeline")],
)
def test_a_flow_student_keeps_the_grid(
    flow_pipeline, tmp_path, gadjax, monkeypatch, timesteps, kind
):
    monkeypatch.setattr(parity, "missing", lambda: ["torch"])  # it is compared below
    workdir = make_workdir(tmp_path / "run", flow_pipeline, timesteps=timesteps, objective=DMD)
    out = tmp_path / "student"
    gadjax("export", "--workdir", workdir, "--out", out)
    steps = len(timesteps)
    assert read_sampling(out, SamplingConfig()) == SamplingConfig(steps, None, 1.0, LENGTH)
    assert "timesteps" not in json.loads((out / "gadjax.json").read_text())
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    expected = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1, "flow_shift": 1.0}
    assert scheduler.items() >= (expected | FLOW).items()
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == kind
    assert difference(out) <= 2e-5
    card = (out / "README.md").read_text()
    assert f", from the time{'s' if steps > 1 else ''} 999" in card
    assert "- distillation\n" in card and f"import {kind}" in card
    assert f"num_inference_steps={steps}, guidance_scale=1.0" in card


def short_run(folder, teacher, prompts, timesteps, objective):
    return config_file(
        folder / "config.py",
        teacher=str(teacher),
        objective=objective,
        student={"steps": len(timesteps), "timesteps": timesteps},
        data={"prompts": str(prompts), "length": LENGTH},
        **{"steps": 1, "batch": 2, "remat": "none"},
        **{"preview": {"every": 0}, "optim": {"lr": 1e-3}},
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("eps", marks=pytest.mark.slow), "flow"])
def test_a_student_of_one_step_from_training_to_diffusers(
    tiny_pipeline, flow_pipeline, prompts, tmp_path, gadjax, kind
):
    teacher, start = {"eps": (tiny_pipeline, 899), "flow": (flow_pipeline, 999)}[kind]
    config = short_run(tmp_path, teacher, prompts, (start,), {"regression": {"steps": 2}})
    run, out = tmp_path / "run", tmp_path / "student"
    gadjax("train", "--config", config, "--workdir", run)
    gadjax("export", "--workdir", run, "--out", out)
    assert read_sampling(out, SamplingConfig()) == SamplingConfig(1, None, 1.0, LENGTH)
    verified = json.loads((out / "gadjax.json").read_text())["verified"]
    assert verified["prompts"] == 3 and verified["max_difference"] <= 2e-5
    gadjax("sample", "--model", run, "--prompts", prompts, "--out", tmp_path / "by_run")
    gadjax("sample", "--model", out, "--prompts", prompts, "--out", tmp_path / "by_folder")
    for name in ("00000-0.png", "00001-0.png"):
        assert (tmp_path / "by_run" / name).read_bytes() == (
            tmp_path / "by_folder" / name
        ).read_bytes()


def test_other_times_are_refused_before_training_and_after(flow_pipeline, prompts, tmp_path, fails):
    words = "found 899, 449; expected 999, 499.5, the grid of 2"
    config = short_run(tmp_path, flow_pipeline, prompts, (899, 449), DMD)
    run, out = tmp_path / "run", tmp_path / "out"
    fails(
        ["train", "--config", config, "--workdir", run],
        *(2, f"student.timesteps: {words}"),
        out=run,
    )
    workdir = make_workdir(tmp_path / "old", flow_pipeline, timesteps=(899, 449), objective=DMD)
    fails(["export", "--workdir", workdir, "--out", out], 2, f"timesteps: {words}", out=out)
