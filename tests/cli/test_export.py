"""An exported folder is a diffusers pipeline that draws what gadjax draws, or there is none."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import edit, same, state
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from huggingface_hub import ModelCard
from workdirs import LENGTH, TIMESTEPS, make_workdir

from gadjax import parity
from gadjax.convert.files import fingerprint
from gadjax.convert.folder import read_pipeline
from gadjax.convert.recipe import Sampling, read_sampling, read_world
from gadjax.convert.tensors import tensors_from_params
from gadjax.sampling import draw, initial_noise


def transformer(folder):
    return read_pipeline(folder, components=("transformer",)).components["transformer"].params


def test_a_student(workdir, tiny_pipeline, tmp_path, gadjax):
    out = tmp_path / "student"
    said = gadjax("export", "--workdir", workdir, "--out", out)
    assert "average of step 2" in said and "largest difference" in said

    wanted = jax.tree.map(lambda x: np.asarray(jnp.asarray(x) * (1 - 0.04)), transformer(out))
    ema = jax.tree.map(lambda x: jnp.asarray(x) * (1 - 0.02 * 2), transformer(tiny_pipeline))
    assert jax.tree.structure(wanted) == jax.tree.structure(ema)
    jax.tree.map(np.testing.assert_array_equal, transformer(out), ema)
    for name in ("vae", "text_encoder"):
        assert same(state(out, name), state(tiny_pipeline, name))

    found = json.loads((out / "gadjax.json").read_text())
    assert read_sampling(out) == Sampling(4, TIMESTEPS, 1.0, LENGTH)
    assert found["timesteps"] == list(TIMESTEPS)
    assert found["objective"] == {"dmd": {}, "gad": {"weight": 0.3, "steps": 4}}
    assert found["trained"] == {"steps": 2, "batch": 32, "weights": "ema"}
    assert found["teacher"]["name"] == "tiny"
    assert 0 <= found["verified"]["max_difference"] <= 2 / 255

    card = ModelCard.load(out / "README.md")
    assert card.data.license == "unknown" and card.data.base_model == "tiny"
    assert "distillation" in card.data.tags and card.data.library_name == "diffusers"
    assert "1 dmd + 0.3 gad (steps 4)" in card.text and "drew the same" in card.text
    assert str(tiny_pipeline.parent) not in card.content

    # The card's own line of Python draws what gadjax draws.
    pipe = PixArtAlphaPipeline.from_pretrained(out, dtype=torch.float32)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert pipe.scheduler.config.solver_order == 1
    pipe.set_progress_bar_config(disable=True)
    noise = initial_noise(3, 1, (8, 8, 4))
    line = next(x for x in card.text.splitlines() if x.startswith("image = pipe("))
    names = {"pipe": pipe, "prompt": "a blue circle"}
    names["latents"] = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    exec(line, names)
    theirs = np.asarray(names["image"], np.float32) / 255
    pipeline, params = parity.load_pipeline(out)
    ours = draw(pipeline, params, read_sampling(out), ["a blue circle"], noise)[0] / 2 + 0.5
    assert np.abs(ours - theirs).max() <= 2 / 255


def test_sample_draws_the_same_from_workdir_and_export(workdir, prompts, tmp_path, gadjax):
    for model, name in ((workdir, "a"), (tmp_path / "student", "b")):
        if model != workdir:
            gadjax("export", "--workdir", workdir, "--out", model)
        gadjax("sample", "--model", model, "--prompts", prompts, "--out", tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_weights_of_a_step_in_half_precision(workdir, tiny_pipeline, tmp_path, gadjax):
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
    workdir = make_workdir(tmp_path / "run", teacher, data=data, guidance=2.5)
    # An objective given whole, for update() would add to the other.
    for step in (1, 2):
        meta = workdir / "checkpoints" / str(step) / "meta" / "metadata"
        content = json.loads(meta.read_text())
        content["config"]["objective"] = {"denoising": {}}
        meta.write_text(json.dumps(content))
        (workdir / "checkpoints" / str(step) / "seal.json").unlink()
    out = tmp_path / "new"
    gadjax("export", "--workdir", workdir, "--out", out)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((teacher / name).read_text())
    assert read_sampling(out) == Sampling(20, None, 2.5, LENGTH)
    assert "timesteps" not in json.loads((out / "gadjax.json").read_text())
    assert read_world(out) == "shapes"
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "openrail++" and "distillation" not in card.data.tags
    assert "num_inference_steps=20, guidance_scale=2.5" in card.text


def test_nothing_is_left_of_what_is_not_the_same(workdir, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(parity, "PICTURE_BOUND", -1.0)
    out = tmp_path / "student"
    fails(["export", "--workdir", workdir, "--out", out], 3, "verification", out=out)

    def broken(*arguments):
        raise ValueError("no such\nlayer")

    monkeypatch.setattr(parity, "_pictures", broken)
    fails(["export", "--workdir", workdir, "--out", out], 3, "diffusers: ValueError", out=out)


def test_verified_later(workdir, tmp_path, gadjax, fails, monkeypatch):
    out = tmp_path / "student"
    with monkeypatch.context() as patch:
        patch.setattr(parity, "missing", lambda: ["torch"])
        said = gadjax("export", "--workdir", workdir, "--out", out)
        assert f"gadjax export --verify {out}" in said
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


def test_the_report_is_of_these_weights(workdir, tmp_path, gadjax, fails, monkeypatch):
    monkeypatch.setattr(parity, "missing", lambda: ["torch"])
    out, report = tmp_path / "student", tmp_path / "report.json"
    gadjax("export", "--workdir", workdir, "--out", out)
    part = read_pipeline(out).components["transformer"]
    metrics = {"adherence": {"value": 0.5, "low": 0.25, "high": 0.75}}
    metrics |= {"pairwise_distance": {"value": 2.0, "low": None, "high": None}}
    content = {
        "settings": {
            "student's transformer": fingerprint(
                tensors_from_params(part.params, part.module.KEYMAP)
            )
        },
        "rows": {
            "teacher": {"label": "teacher, 20 steps", "evaluations": 40, "metrics": metrics},
            "student": {"label": "student, 4 steps", "evaluations": 4, "metrics": {}},
        },
    }
    report.write_text(json.dumps(content))
    flags = ["--workdir", workdir, "--out", out, "--overwrite", "--report", report]
    gadjax("export", *flags)
    card = (out / "README.md").read_text()
    assert "| | teacher, 20 steps | student, 4 steps |" in card
    assert "| adherence | 0.500 (0.250 to 0.750) |  |" in card
    assert "| pairwise distance | 2.000 |  |" in card

    fails(["export", *flags, "--no-ema"], 2, report, "of weights", out=out)
    report.write_text('{"rows": 3}')
    fails(["export", *flags], 2, report, "report.json", out=out)


def test_a_teacher_that_moved_or_changed(tiny_pipeline, tmp_path, gadjax, fails, monkeypatch):
    monkeypatch.setattr(parity, "missing", lambda: ["torch"])
    before, after, own = tmp_path / "before", tmp_path / "after", tmp_path / "own"
    shutil.copytree(tiny_pipeline, before)
    workdir = make_workdir(tmp_path / "run", before)
    before.rename(after)
    gadjax("convert", after, own)
    out = tmp_path / "student"
    flags = ["--workdir", workdir, "--out", out]
    fails(["export", *flags], 2, before, "no such folder", out=out)
    for teacher in (after, own):
        gadjax("export", *flags, "--teacher", teacher, "--overwrite")
        assert same(state(out, "vae"), state(tiny_pipeline, "vae"))
    shutil.rmtree(out)
    shutil.rmtree(after / "transformer")
    shutil.copytree(make_other(tiny_pipeline, tmp_path) / "transformer", after / "transformer")
    fails(["export", *flags, "--teacher", after], 2, after / "transformer", out=out)


def make_other(folder, tmp_path):
    from gadjax.convert.folder import write_pipeline

    params = jax.tree.map(lambda x: x * 2, transformer(folder))
    return write_pipeline(folder, tmp_path / "other", {"transformer": params})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--step", "7"], ["2, 1", "expected 7"]),
        (["--step", "-1"], ["--step: found -1"]),
        (["--dtype", "int8"], ["--dtype: found 'int8'"]),
        (["--workdir", "absent"], ["absent", "no such folder"]),
        (["--teacher", "absent"], ["absent", "no such folder"]),
        (["--report", "absent.json"], ["absent.json"]),
        (["--colour", "red"], ["--colour"]),
    ],
)
def test_bad_flags(flags, words, workdir, tmp_path, fails):
    out = tmp_path / "out"
    given = {"--workdir": workdir, "--out": out} | dict([flags])
    fails(["export", *(x for pair in given.items() for x in pair)], 2, *words, out=out)


def test_bad_folders(workdir, tiny_pipeline, tmp_path, fails):
    out = tmp_path / "out"
    fails(["export", "--out", out], 2, "--workdir", out=out)
    fails(["export", "--workdir", workdir], 2, "--out", out=out)
    fails(["export", "--workdir", tiny_pipeline, "--out", out], 2, "workdir", out=out)
    flags = ["--out", tiny_pipeline, "--overwrite"]
    fails(["export", "--workdir", workdir, *flags], 2, "elsewhere", out=tiny_pipeline)
    out.mkdir()
    (out / "a.jpg").write_text("mine")
    fails(["export", "--workdir", workdir, "--out", out], 2, "files in it", out=out)


def test_timesteps_that_diffusers_cannot_take(tiny_pipeline, tmp_path, fails):
    workdir = make_workdir(tmp_path / "run", tiny_pipeline)
    for step in (1, 2):
        folder = workdir / "checkpoints" / str(step)
        meta = json.loads((folder / "meta" / "metadata").read_text())
        meta["config"]["student"]["timesteps"] = [899.5, 674, 449, 224]
        edit(folder / "meta" / "metadata", **meta)
        (folder / "seal.json").unlink()
    out = tmp_path / "out"
    fails(["export", "--workdir", workdir, "--out", out], 2, "899.5", "whole numbers", out=out)
