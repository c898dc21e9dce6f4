"""Pictures drawn by the command are diffusers' own, and bad input leaves nothing behind."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from checkpoints import edit
from PIL import Image
from workdirs import make_workdir, numbers

from gadjax.pipelines.sampling import initial_noise

LATENT = (8, 8, 4)


def test_a_folder_is_drawn_as_by_diffusers(
    torch_pipeline, tiny_pipeline, prompts, tmp_path, gadjax
):
    out = tmp_path / "out"
    flags = ("--steps", 4, "--guidance", 3.5, "--per-prompt", 2, "--seed", 5, "--batch", 3)
    output = gadjax("sample", "--model", tiny_pipeline, "--prompts", prompts, "--out", out, *flags)
    assert "4 images in 4 steps" in output

    lines = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    texts = prompts.read_text().splitlines()
    names = ["00000-0.png", "00000-1.png", "00001-0.png", "00001-1.png"]
    assert [line["file"] for line in lines] == names
    assert [line["prompt"] for line in lines] == [texts[0], texts[0], texts[1], texts[1]]
    assert sorted(path.name for path in out.iterdir()) == [*names, "grid.png", "prompts.jsonl"]
    assert Image.open(out / "grid.png").width > 2 * 128

    noise = np.stack([initial_noise(n["seed"], n["noise"] + 1, LATENT)[n["noise"]] for n in lines])
    assert len({x.tobytes() for x in noise}) == 4
    torch_pipeline.set_progress_bar_config(disable=True)
    theirs = torch_pipeline(
        [line["prompt"] for line in lines],
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=4,
        guidance_scale=3.5,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="np",
    ).images
    ours = numbers(Image.open(out / name) for name in names)
    assert ours.std() > 0.05
    assert np.abs(ours - theirs).max() <= 2 / 255


def test_earlier_pictures_are_replaced_when_asked(tiny_pipeline, prompts, tmp_path, gadjax, fails):
    out = tmp_path / "out"
    out.mkdir()
    (out / "prompts.jsonl").write_text("{}\n")
    (out / "00009-0.png").write_text("old")
    flags = ["--prompts", prompts, "--out", out, "--steps", 1, "--guidance", 1]
    fails(["sample", "--model", tiny_pipeline, *flags], 2, out, "new or empty", out=out)
    gadjax("sample", "--model", tiny_pipeline, *flags, "--overwrite")
    assert len(list(out.glob("0*.png"))) == 2 and not (out / "00009-0.png").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0"], ["--steps: found 0"]),
        (["--steps", "many"], ["gadjax sample", "--steps"]),
        (["--seed", "-1"], ["--seed: found -1"]),
        (["--seed", str(2**64)], ["--seed: found 18446744073709551616; expected 0 to 2^64 - 1"]),
        (["--per-prompt", "0"], ["--per-prompt: found 0"]),
        (["--batch", "0"], ["--batch: found 0"]),
        (["--guidance", "nan"], ["--guidance: found nan"]),
        (["--dtype", "int8"], ["dtype: found 'int8'"]),
        (["--variant", "fp8"], ["fp8"]),
        (["--model", "absent"], ["absent", "no such folder"]),
        (["--prompts", "absent.txt"], ["absent.txt"]),
        (["--size", "18x16"], ["--size: found 18x16 pixels; latents: found 9 x 8; expected multi"]),
        (["--size", "15x16"], ["--size: found 15x16; expected multiples of 2 pixels"]),
        (["--size", "huge"], ["--size: found 'huge'; expected HEIGHTxWIDTH"]),
        (["--student-preset", "magic"], ["--student-preset: found 'magic'; expected one of tdm"]),
        (["--student-preset", "sid-sd"], ["expected a StableDiffusionPipeline for sid-sd"]),
        (["--colour", "red"], ["gadjax sample: found '--colour'"]),
    ],
)
def test_bad_flags(flags, words, tiny_pipeline, prompts, tmp_path, fails):
    out = tmp_path / "out"
    given = {"--model": tiny_pipeline, "--prompts": prompts, "--out": out}
    given |= dict([flags])
    fails(["sample", *(x for pair in given.items() for x in pair)], 2, *words, out=out)


def test_a_missing_flag(prompts, tmp_path, fails):
    out = tmp_path / "out"
    fails(["sample", "--prompts", prompts, "--out", out], 2, "--model", out=out)


def test_a_student_takes_no_other_steps(tiny_pipeline, workdir, prompts, tmp_path, fails):
    student = shutil.copytree(tiny_pipeline, tmp_path / "student")
    (student / "gadjax.json").write_text('{"timesteps": [899, 449], "guidance": 1.0}')
    out = tmp_path / "out"
    for model in (student, workdir):
        arguments = ["sample", "--model", model, "--prompts", prompts, "--out", out, "--steps", 8]
        fails(arguments, 2, "--steps: found 8", "899", "449", out=out)


def test_the_teacher_of_a_workdir_may_have_moved(tiny_pipeline, prompts, tmp_path, gadjax, fails):
    before = shutil.copytree(tiny_pipeline, tmp_path / "before")
    workdir = make_workdir(tmp_path / "run", before)
    before.rename(tmp_path / "after")
    out = tmp_path / "out"
    arguments = ["sample", "--model", workdir, "--prompts", prompts, "--out", out]
    fails(arguments, 2, before, "no such folder", "--teacher", "--student-teacher", out=out)
    gadjax(*arguments, "--teacher", tmp_path / "after")
    model = ["sample", "--model", tiny_pipeline, *arguments[3:-1], tmp_path / "two"]
    fails([*model, "--teacher", before], 2, "which is no workdir; expected none", out=out)


def test_a_scheduler_that_is_not_read(tiny_pipeline, prompts, tmp_path, fails):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    edit(model / "scheduler" / "scheduler_config.json", use_karras_sigmas=True)
    out = tmp_path / "out"
    arguments = ["sample", "--model", model, "--prompts", prompts, "--out", out]
    fails(arguments, 2, "use_karras_sigmas", out=out)


def test_the_folder_of_the_model_is_not_overwritten(tiny_pipeline, prompts, tmp_path, fails):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    (model / "prompts.jsonl").write_text("{}\n")
    arguments = ["sample", "--model", model, "--prompts", prompts, "--out", model, "--overwrite"]
    fails(arguments, 2, "elsewhere", out=model)


def test_a_full_disk_leaves_nothing(tiny_pipeline, prompts, tmp_path, fails, monkeypatch):
    def full(image, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gadjax.cli.sample.save_png", full)
    out = tmp_path / "out"
    arguments = ["sample", "--model", tiny_pipeline, "--prompts", prompts, "--out", out]
    arguments += ["--steps", 1, "--guidance", 1]
    fails(arguments, 3, f"stopped: {out}", "No space left on device", out=out)


@pytest.mark.slow
def test_routed_prompts_are_drawn_by_the_first_model_that_matches(
    tiny_pipeline, workdir, prompts, tmp_path, gadjax, fails
):
    """Every picture is that of its model alone, with the noise of its place in the file."""
    prompts.write_text("green square\na red circle\nblue square\na red square\n")
    flags = ["--prompts", prompts, "--per-prompt", 2, "--seed", 3]
    drawn = {"teacher": tiny_pipeline, "student": workdir}
    for name, model in drawn.items():
        gadjax("sample", "--model", model, *flags, "--out", tmp_path / name)
    routes = ["--route", f"^a red={workdir}", "--route", f"red|^blue={tiny_pipeline}"]
    out = tmp_path / "routed"
    output = gadjax("sample", "--model", tiny_pipeline, *flags, *routes, "--out", out)
    assert "8 images in 20 or 4 steps each" in output
    lines = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines[::2]] == prompts.read_text().splitlines()
    for line, by in zip(lines[::2], ("teacher", "student", "teacher", "student"), strict=True):
        assert line["model"] == str(drawn[by])
        for n in range(2):
            name = line["file"].replace("-0", f"-{n}")
            assert (out / name).read_bytes() == (tmp_path / by / name).read_bytes(), name


def test_routes_that_are_none_are_refused(workdir, prompts, tmp_path, fails):
    out = tmp_path / "out"
    for route, words in (
        ("red", "--route: found 'red'; expected REGEX=MODEL"),
        ("(=x", "--route: found '(=x' (missing ), unterminated subpattern"),
        (f"={workdir}", "expected REGEX=MODEL"),
        ("green=nowhere", "nowhere"),
        ("green=asset:shapes_teacher", "--route: found latents and scales"),
    ):
        flags = ["--prompts", prompts, "--route", route, "--out", out]
        fails(["sample", "--model", workdir, *flags], 2, words, out=out)
