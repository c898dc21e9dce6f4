"""The command as a user meets it, and the function behind it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from gadjax.cli.main import main
from gadjax.convert.recipe import Sampling
from gadjax.errors import InputError
from gadjax.evaluation.evaluate import Evaluation, Model, Plan, Row, evaluate
from gadjax.evaluation.metrics import METRICS
from gadjax.evaluation.worlds import WORLDS, World
from gadjax.pipeline import load_pipeline
from gadjax.sampling import draw, initial_noise

PROMPTS = ["red circle", "blue square", "green"]
TEACHER = {"steps": 4, "guidance": 2.0, "length": 6}


@pytest.fixture(scope="module")
def folders(tiny_pipeline, tmp_path_factory):
    """A teacher, a student in two steps, prompts."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, sampling in (
        ("teacher", TEACHER),
        ("student", {"timesteps": [899, 449], "guidance": 1.0, "length": 6}),
    ):
        shutil.copytree(tiny_pipeline, root / name)
        (root / name / "gadjax.json").write_text(json.dumps(sampling))
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def arguments(folders, out, *more):
    given = {name: folders / name for name in ("teacher", "student")}
    given |= {"prompts": folders / "prompts.txt", "out": out, "seeds": 2}
    return ["evaluate", *(f"--{key}={value}" for key, value in given.items()), *more]


def test_the_command(folders, tmp_path, capsys):
    out = tmp_path / "deep" / "report"
    assert main(arguments(folders, out, "--json")) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "report.json",
        "report.md",
        "samples.png",
    ]
    report = json.loads((out / "report.json").read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert list(report["rows"]) == ["teacher", "teacher_few", "student"]
    assert [row["evaluations"] for row in report["rows"].values()] == [8, 4, 2]
    assert report["rows"]["student"]["sampling"]["timesteps"] == [899.0, 449.0]
    student = report["rows"]["student"]["metrics"]
    assert set(student) | set(report["absent"]) == set(METRICS)
    for found in student.values():
        assert found["low"] <= found["value"] <= found["high"]
    assert "frechet" in report["absent"] and "alignment_pixels" in student
    assert report["settings"]["seeds"] == 2

    text = (out / "report.md").read_text()
    for name in METRICS:
        assert METRICS[name][0] in text
    assert "| | teacher, 4 steps | teacher, 2 steps | student, 2 steps |" in text
    picture = Image.open(out / "samples.png")
    assert picture.size[0] > 6 * 96 and picture.size[1] > 3 * 96


def test_flags_and_overwriting(folders, tmp_path, capsys, monkeypatch):
    """What the command passes on, and what it does with the answer."""
    asked = []

    def answer(*args):
        asked.append(args)
        images = np.zeros((3, 2, 8, 8, 3), np.float32)
        row = Row("teacher", "teacher, 2 steps", args[0].sampling, 2, images, {})
        return Evaluation([row], {"adherence": "no oracle"})

    monkeypatch.setattr("gadjax.evaluation.evaluate.evaluate", answer)
    more = ("--tangents=0", "--batch=3", "--teacher-steps=2", "--teacher-guidance=1")
    assert main(arguments(folders, tmp_path / "out", *more)) == 0
    teacher, student, prompts, world, plan = asked[0]
    assert teacher.sampling == Sampling(2, None, 1.0, 6)
    assert student.sampling == Sampling(2, (899.0, 449.0), 1.0, 6)
    assert prompts == PROMPTS and plan == Plan(2, 0, 3) and world is WORLDS["none"]
    report = tmp_path / "out" / "report.md"
    assert capsys.readouterr().out == report.read_text()

    before = report.stat().st_mtime_ns
    assert main(arguments(folders, tmp_path / "out")) == 2
    assert "found a folder with files in it" in capsys.readouterr().err
    assert report.stat().st_mtime_ns == before and len(asked) == 1
    assert main(arguments(folders, tmp_path / "out", "--overwrite")) == 0
    assert report.stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--world=nowhere",), "--world: found 'nowhere'; expected one of none, shapes"),
        (("--world=shapes",), "found one of 32 x 32 pictures; expected 16 x 16"),
        (("--seeds=1",), "seeds: found 1; expected 2 or more"),
        (("--tangents=-1",), "tangents: found -1"),
        (("--batch=0",), "batch: found 0"),
        (("--dtype=int8",), "dtype: found 'int8'"),
        (("--student=/nowhere",), "/nowhere: found no such folder"),
        (("--prompts=/nowhere.txt",), "/nowhere.txt: found"),
        (("--teacher-steps=0",), "steps: found 0"),
        (("--teacher-steps=x",), "--teacher-steps"),
    ],
)
def test_bad_input(folders, tmp_path, capsys, more, message):
    assert main(arguments(folders, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def teacher(folders):
    return Model("teacher", *load_pipeline(folders / "teacher"), Sampling(**TEACHER))


def colours(images_NHWC):
    return images_NHWC.mean((1, 2)) - 0.1


@pytest.fixture(scope="module")
def itself(teacher):
    """A teacher evaluated as its own student."""

    def bright(images_NHWC, captions):
        assert captions == ["red circle"] * 2 + ["blue square"] * 2 + ["green"] * 2
        return images_NHWC.mean((1, 2, 3)) > 0

    world = World(bright, colours, read=str.upper)
    return evaluate(teacher, teacher, PROMPTS, world, Plan(2, 2, 4))


def test_a_student_that_is_its_teacher(itself):
    first, few, same = itself.rows
    for name in METRICS:
        if name.endswith("_ratio") or "alignment" in name or name == "tangent_cosine":
            np.testing.assert_allclose(same.metrics[name], 1, atol=1e-6)
        else:
            assert same.metrics[name] == first.metrics[name]
    assert first.metrics["adherence"].value == np.mean(first.images_PSHWC.mean((2, 3, 4)) > 0)
    assert first.metrics["frechet"].value > 0 and not itself.absent
    # Four steps of four are no hurry.
    np.testing.assert_array_equal(few.images_PSHWC, same.images_PSHWC)


def test_a_seed_is_that_of_the_sample_command(itself, teacher):
    noise = initial_noise(1, 3, teacher.pipeline.latent)
    alone = draw(teacher.pipeline, teacher.params, teacher.sampling, PROMPTS, noise)
    np.testing.assert_allclose(itself.rows[2].images_PSHWC[:, 1], alone, atol=1e-5)


def test_prompts_that_the_oracle_cannot_read(teacher):
    def read(caption):
        raise InputError(f"caption: found {caption!r}; expected another")

    with pytest.raises(InputError, match="prompts: caption: found 'red circle'"):
        evaluate(teacher, teacher, PROMPTS, World(read=read), Plan())


def test_pictures_that_are_not_finite(teacher):
    broken = {**teacher.params, "vae": dict(teacher.params["vae"])}
    broken["vae"]["post_quant_conv"] = {
        name: np.full_like(x, np.nan) for name, x in broken["vae"]["post_quant_conv"].items()
    }
    broken = replace(teacher, name="--teacher x", params=broken)
    with pytest.raises(InputError, match="--teacher x: found pictures that are not finite"):
        evaluate(broken, teacher, PROMPTS, World(), Plan(2, 0))
