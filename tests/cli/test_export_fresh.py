"""Students that add fresh noise after their steps: trained, previewed, resumed, exported, drawn."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_run import config_file

from gadjax.formats.diffusers_folder import INDEX

SCHEDULERS = {
    "tiny": ("LCMScheduler", (900, 600, 300)),
    "sd3": ("FlowMatchLCMScheduler", (1000, 750.5, 400)),
    "sana": ("FlowMatchLCMScheduler", (999, 600, 300)),
    "flux_schnell": ("FlowMatchLCMScheduler", (1000, 750.5, 400)),
    "sdxl": ("LCMScheduler", (999, 749, 499, 249)),
}
FAMILIES = ("sd3", "sana", "sdxl", "flux_schnell")
OBJECTIVE = {"dmd": {}, "gad": {"end": "clean", "steps": 1}, "anchor": {"steps": 1}}


def write(path, teacher, prompts, times, **changes):
    settings = dict(
        teacher=str(teacher),
        objective=OBJECTIVE,
        student={"steps": len(times), "timesteps": times, "rollout": "fresh_noise"},
        data={"prompts": str(prompts), "length": 8},
        preview={"every": 2, "prompts": 2, "scale": 1},
        optim={"lr": 1e-3},
    )
    return config_file(path, **settings | {"steps": 2, "batch": 2, "remat": "none"} | changes)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny", *FAMILIES])
def test_from_training_to_diffusers(family, request, folders, prompts, tmp_path, gadjax):
    teacher = request.getfixturevalue("tiny_pipeline") if family == "tiny" else folders(family)
    scheduler, times = SCHEDULERS[family]
    data = {"prompts": str(prompts), "length": 77 if family == "sdxl" else 8}
    config = write(tmp_path / "config.py", teacher, prompts, times, data=data)
    run, out = tmp_path / "run", tmp_path / "student"
    gadjax("train", "--config", config, "--workdir", run)
    gadjax("export", "--workdir", run, "--out", out)
    assert json.loads((out / INDEX).read_text())["scheduler"][1] == scheduler
    verified = json.loads((out / "gadjax.json").read_text())["verified"]
    assert verified["max_difference"] <= 2 / 255, verified
    gadjax("sample", "--model", run, "--prompts", prompts, "--out", tmp_path / "by_run")
    gadjax("sample", "--model", out, "--prompts", prompts, "--out", tmp_path / "by_folder")
    for name in ("00000-0.png", "00001-0.png"):
        ours = (tmp_path / "by_run" / name).read_bytes()
        assert ours == (tmp_path / "by_folder" / name).read_bytes()
    # The preview is drawn with the same noise: neither the ODE's picture nor another one's.
    assert np.asarray(Image.open(run / "previews" / "0000002.png")).std() > 0


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(tiny_pipeline, prompts, tmp_path, gadjax, fails):
    times = (900, 600, 300)
    whole = write(tmp_path / "whole.py", tiny_pipeline, prompts, times, steps=4)
    half = write(tmp_path / "half.py", tiny_pipeline, prompts, times)
    gadjax("train", "--config", whole, "--workdir", tmp_path / "whole")
    gadjax("train", "--config", half, "--workdir", tmp_path / "parts")
    gadjax("train", "--config", whole, "--workdir", tmp_path / "parts")
    for name in ("whole", "parts"):
        gadjax("export", "--workdir", tmp_path / name, "--out", tmp_path / f"{name}-student")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    a, b = ((tmp_path / f"{name}-student" / weights).read_bytes() for name in ("whole", "parts"))
    assert a == b
    ode = write(tmp_path / "ode.py", tiny_pipeline, prompts, times, steps=4)
    arguments = ["train", "--config", ode, "--config.student.rollout=ode"]
    fails([*arguments, "--workdir", tmp_path / "parts"], 2, "student.rollout", out=tmp_path / "out")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"student": {"rollout": "sde"}}, "student.rollout: found 'sde'; expected"),
        ({"student": {"guidance": 2.0}}, "student.guidance: found 2.0; expected 1.0, as no scale"),
        ({"objective": {"tdm": {}}}, "objective.tdm: found a loss of the student's next latent"),
    ],
)
def test_what_is_refused(tiny_pipeline, prompts, tmp_path, fails, change, words):
    config = write(tmp_path / "c.py", tiny_pipeline, prompts, (900, 600), **change)
    run = tmp_path / "run"
    fails(["train", "--config", config, "--workdir", run], 2, words, out=run)


def test_a_flow_that_no_scheduler_could_draw_is_refused(prompts, tmp_path, fails):
    teacher, run = "asset:shapes_flow_teacher", tmp_path / "run"
    config = write(tmp_path / "c.py", teacher, prompts, (999, 500))
    words = "student.rollout: found 'fresh_noise' for a PixArtAlphaPipeline of a flow"
    fails(["train", "--config", config, "--workdir", run], 2, words, out=run)


@pytest.mark.slow
def test_a_student_trained_without_its_teacher_is_a_student_everywhere(prompts, tmp_path, gadjax):
    """Consistency training: previewed, sampled, evaluated and exported on its own grid."""
    teacher, run, out = "asset:shapes_teacher", tmp_path / "run", tmp_path / "student"
    data = {"world": "gadjax.worlds.shapes", "length": 16, "cache": 8}
    more = {"objective": {"ct": {}}, "data": data, "attention": "jnp"}
    config = write(tmp_path / "config.py", teacher, prompts, (899, 449), **more)
    gadjax("train", "--config", config, "--workdir", run)
    assert Image.open(run / "previews" / "0000002.png").height < 2 * 32  # one row
    gadjax("export", "--workdir", run, "--out", out)
    entries = json.loads((out / "gadjax.json").read_text())
    assert entries["timesteps"] == [899, 449] and entries["guidance"] == 1
    assert "guidance" not in entries["teacher"]
    assert entries["verified"]["max_difference"] <= 2 / 255
    text = (out / "README.md").read_text()
    assert "Trained on pictures" in text and "guidance of the teacher" not in text
    assert json.loads((out / INDEX).read_text())["scheduler"][1] == "LCMScheduler"
    gadjax("sample", "--model", run, "--prompts", prompts, "--out", tmp_path / "by_run")
    gadjax("sample", "--model", out, "--prompts", prompts, "--out", tmp_path / "by_folder")
    ours, theirs = (tmp_path / name / "00000-0.png" for name in ("by_run", "by_folder"))
    assert ours.read_bytes() == theirs.read_bytes()
    arguments = ["--teacher", teacher, "--student", run, "--prompts", prompts]
    arguments += ["--world", "none", "--seeds", 2, "--teacher-steps", 2]
    report = gadjax("evaluate", *arguments, "--out", tmp_path / "report")
    assert "the student does not say at which it was distilled" in report
