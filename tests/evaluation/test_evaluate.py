"""`gadjax evaluate`: the command, and the function behind it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from gadjax.assets import resolve
from gadjax.cli import evaluate as cli
from gadjax.cli.main import main
from gadjax.cli.students import label_students
from gadjax.errors import InputError
from gadjax.evaluation.evaluate import evaluate
from gadjax.evaluation.metric_catalogue import GROUPS, catalogue
from gadjax.evaluation.oracles import WORLDS, Layout, Oracle, World
from gadjax.evaluation.report import write_report
from gadjax.evaluation.results import Evaluation, EvaluationConfig, Row
from gadjax.evaluation.rows import label_rows
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.io.image_grid import from_uint8
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.pipelines.sampling import draw, initial_noise

PROMPTS = ["red circle", "blue square", "green"]
LEVEL = 0.5001 / 127.5 + 1e-5  # rounding to uint8, and another place in the batch
TEACHER = {"steps": 4, "guidance": 2.0, "length": 6}


@pytest.fixture(scope="module")
def folders(tiny_pipeline, tmp_path_factory):
    """Folders of a teacher and of a student in two steps, and a file of prompts."""
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


@pytest.mark.slow
def test_the_command(folders, tmp_path, capsys):
    out = tmp_path / "deep" / "report"
    assert main(arguments(folders, out, "--json")) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
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
    listed = catalogue(WORLDS["none"])
    assert set(student) | set(report["absent"]) == set(listed) == set(report["meaning"])
    for found in student.values():
        assert found["low"] <= found["value"] <= found["high"]
    assert "frechet" in report["absent"] and "alignment_pixels" in student
    assert report["settings"]["seeds"] == 2

    text = (out / "report.md").read_text()
    for metric in listed.values():
        assert metric.title in text
    assert "| | teacher, 4 steps | teacher, 2 steps | student, 2 steps |" in text
    picture = Image.open(out / "samples.png")
    assert picture.size[0] > 6 * 96 and picture.size[1] > 3 * 96


def test_flags_and_overwriting(folders, tmp_path, capsys, monkeypatch):
    """Arguments that the command passes on, and files that it writes from the result."""
    calls = []

    def fake_evaluate(*args):
        calls.append(args)
        images = np.zeros((3, 2, 8, 8, 3), np.uint8)
        row = Row("teacher", "teacher, 2 steps", args[0].sampling, 2, images, {})
        return Evaluation([row], catalogue(WORLDS["none"]), {"adherence": "no oracle"})

    monkeypatch.setattr("gadjax.evaluation.evaluate.evaluate", fake_evaluate)
    more = (
        "--tangents=0",
        "--batch=3",
        "--library=5",
        "--moves=4",
        "--teacher-steps=2",
        "--teacher-guidance=1",
    )
    assert main(arguments(folders, tmp_path / "out", *more)) == 0
    teacher, student, prompts, world, config = calls[0]
    assert teacher.sampling == SamplingConfig(2, None, 1.0, 6)
    assert student.sampling == SamplingConfig(2, (899.0, 449.0), 1.0, 6)
    assert (
        prompts == PROMPTS and config == EvaluationConfig(2, 0, 3, 5, 4) and world is WORLDS["none"]
    )
    report = tmp_path / "out" / "report.md"
    assert capsys.readouterr().out == report.read_text()

    before = report.stat().st_mtime_ns
    assert main(arguments(folders, tmp_path / "out")) == 2
    assert "found a folder with files in it" in capsys.readouterr().err
    assert report.stat().st_mtime_ns == before and len(calls) == 1
    assert main(arguments(folders, tmp_path / "out", "--overwrite")) == 0
    assert report.stat().st_mtime_ns > before


def test_several_students(folders, tmp_path, monkeypatch):
    """Each with its own flags, under labels of their own; settings by the keys of their rows."""
    calls, loaded = [], []

    def fake_load(flag, name, dtype, changes, **options):
        loaded.append((flag, name.rpartition("/")[2], options))
        return real_load(flag, name, dtype, changes)

    def fake_evaluate(*args):
        calls.append(args)
        images = np.zeros((3, 2, 8, 8, 3), np.uint8)
        rows = [
            Row(key, label, model.sampling, 2, images, {})
            for key, (label, model) in label_rows(*args[:2]).items()
        ]
        return Evaluation(rows, catalogue(WORLDS["none"]), {})

    real_load = cli._load_model
    monkeypatch.setattr("gadjax.cli.evaluate._load_model", fake_load)
    monkeypatch.setattr("gadjax.evaluation.evaluate.evaluate", fake_evaluate)
    more = ("--lora=a.safetensors:0.5", "--lora=b", f"--student={folders / 'student'}")
    more += ("--lora=c", "--student-preset=tdm-pixart", f"--student={folders / 'teacher'}")
    more += (f"--student={folders / 'student'}",)
    assert main(arguments(folders, tmp_path / "out", *more)) == 0
    assert loaded == [
        ("--student", "student", {"lora": ["a.safetensors:0.5", "b"]}),
        ("--student", "student", {"lora": ["c"], "student_preset": "tdm-pixart"}),
        ("--student", "teacher", {}),
        ("--student", "student", {}),
        ("--teacher", "teacher", {}),
    ]
    assert list(calls[0][1]) == ["student + a:0.5 + b", "student + c", "teacher", "student"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    steps = {key: row["label"] for key, row in report["rows"].items()}
    assert steps == {
        "teacher": "teacher, 4 steps",
        "teacher_few": "teacher, 2 steps",
        "teacher_few_4": "teacher, 4 steps",
        "student": "student + a:0.5 + b, 2 steps",
        "student_2": "student + c, 2 steps",
        "student_3": "teacher, 4 steps",
        "student_4": "student, 2 steps",
    }
    settings = report["settings"]
    assert settings["student"].endswith("student --lora a.safetensors:0.5 --lora b")
    assert settings["student_2"].endswith("student --lora c --student-preset tdm-pixart")
    assert settings["student_4's transformer"] == settings["student's transformer"]
    assert settings["command"].startswith("gadjax evaluate --teacher=")


def test_labels_that_are_alike_are_numbered():
    given = [{"name": "a/b"}, {"name": "asset:b"}, {"name": "b", "lora": ["x/l.safetensors:2"]}]
    assert list(label_students(given)) == ["b", "b (2)", "b + l:2"]


def test_students_of_different_guidances_need_the_flag(folders, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "students"
    for name, guidance in (("a", 4.0), ("b", 2.0)):
        shutil.copytree(folders / "student", folder / name)
        sampling = json.loads((folder / name / "gadjax.json").read_text())
        sampling["teacher"] = {"name": "teacher", "guidance": guidance}
        (folder / name / "gadjax.json").write_text(json.dumps(sampling))
    more = (f"--student={folder / 'a'}", f"--student={folder / 'b'}")
    assert main(arguments(folders, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert f"found students distilled at 4 ({folder / 'a'}), 2 ({folder / 'b'})" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("distilled_at", "more", "guidance", "text"),
    [
        (None, (), 2.0, "2 (the student does not say at which it was distilled)"),
        (4.0, (), 4.0, "4, at which the student was distilled"),
        (4.0, ("--teacher-guidance=3",), 3.0, "3, but the student was distilled at 4"),
    ],
)
def test_the_teacher_is_evaluated_at_the_guidance_of_the_distillation(
    folders, tmp_path, capsys, monkeypatch, distilled_at, more, guidance, text
):
    student = tmp_path / "student"
    shutil.copytree(folders / "student", student)
    if distilled_at:
        sampling = json.loads((student / "gadjax.json").read_text())
        sampling["teacher"] = {"name": "teacher", "guidance": distilled_at}
        (student / "gadjax.json").write_text(json.dumps(sampling))

    def fake_evaluate(teacher, *_):
        images = np.zeros((3, 2, 8, 8, 3), np.uint8)
        row = Row("teacher", "teacher, 4 steps", teacher.sampling, 8, images, {})
        return Evaluation([row], catalogue(WORLDS["none"]), {})

    monkeypatch.setattr("gadjax.evaluation.evaluate.evaluate", fake_evaluate)
    more = f"--student={student}", *more
    assert main(arguments(folders, tmp_path / "out", *more)) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"| guidance | {guidance:g} |" in report and f"- teacher's guidance: {text}" in report
    assert ("but the student" in capsys.readouterr().err) == ("but" in text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--world=nowhere",), "--world: found 'nowhere'; expected one of none, shapes"),
        (("--world=shapes",), "found one of 32 x 32 pictures; expected 16 x 16"),
        (("--seeds=1",), "seeds: found 1; expected 2 or more"),
        (("--tangents=-1",), "tangents: found -1"),
        (("--batch=0",), "batch: found 0"),
        (("--library=-1",), "library: found -1; expected 0 or more"),
        (("--library=1",), "library: found 1 noise; expected 2 or more, or 0 for none"),
        (("--moves=-1",), "moves: found -1"),
        (("--moves=x",), "--moves"),
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
    return Model("teacher", *load_pipeline(folders / "teacher"), SamplingConfig(**TEACHER))


def colours(images_NHWC):
    return images_NHWC.mean((1, 2))[:, :2] - 0.1


def classify(images_NHWC):
    """Word of the brighter side, for pictures that are bright enough."""
    left, right = (x.mean((1, 2, 3)) for x in np.split(images_NHWC, 2, axis=2))
    sides = np.where(left > right, "left", "right")
    return np.where(images_NHWC.mean((1, 2, 3))[:, None] > -0.2, sides[:, None], "")


def parse(caption):
    named = [word for word in caption.split() if word in SIDES.places]
    return {"side": named[0]} if named else {}


def brighter(image_HWC, place_2):
    """Square of 1 less the contrast between the halves, towards the target place."""
    left, right = (x.mean() for x in (image_HWC[:, :8], image_HWC[:, 8:]))
    return (1 - (right - left) * (place_2[0] - 8) / 4) ** 2


SIDES = Layout("side", {"left": (4.0, 8.0), "right": (12.0, 8.0)}, brighter)
WORLD = World(Oracle(("side",), classify, parse), colours, None, ("red circle", "blue"), SIDES)


@pytest.fixture(scope="module")
def itself(teacher):
    """Evaluation of a teacher as its own student, all tasks included."""
    return evaluate(teacher, teacher, PROMPTS, WORLD, EvaluationConfig(2, 2, 8, 4, 3, 2))


@pytest.mark.slow
def test_a_student_that_is_its_teacher(itself):
    first, few, same = itself.rows
    assert not itself.absent
    assert set(same.metrics) == set(itself.catalogue) == set(catalogue(WORLD))
    for name, found in same.metrics.items():
        if itself.catalogue[name].group in ("retrieval", "path") and name not in first.metrics:
            assert found == (1, 1, 1)
        elif name.endswith("_ratio") or "alignment" in name or name == "tangent_cosine":
            np.testing.assert_allclose(found, 1, atol=1e-6)
        else:
            assert found == first.metrics[name]
    words = classify(from_uint8(first.images_PSHWC.reshape(6, 16, 16, 3)))
    assert first.metrics["adherence"].value == np.mean(words != "")
    assert first.metrics["frechet"].value > 0
    # Four steps of four are no hurry.
    np.testing.assert_array_equal(few.images_PSHWC, same.images_PSHWC)


def test_layout_targets_are_approached(itself, teacher):
    control = itself.control
    row = control.rows["student"]
    assert row.images_CLHWC.shape == (2, 4, 16, 16, 3)
    noise, targets = control.library.noise_LHWC, control.targets
    alone = draw(teacher, ["blue"] * 4, noise)
    np.testing.assert_allclose(from_uint8(row.images_CLHWC[1]), alone.clip(-1, 1), atol=LEVEL)
    classified = [classify(from_uint8(images)).tolist() for images in row.images_CLHWC]
    assert row.words_CLA.tolist() == classified
    # Every move makes its target half brighter.
    before, after = from_uint8(row.layout_result.images_RNHWC[[0, -1]])
    for n, word in enumerate(targets.places):
        place = np.array(SIDES.places[word])
        assert brighter(after[n], place) < brighter(before[n], place)
        library = from_uint8(row.images_CLHWC[targets.captions[n], n])
        np.testing.assert_allclose(before[n], library, atol=2 * LEVEL)
        assert row.layout_result.reached_RN[-1, n] == (classify(after[n : n + 1])[0, 0] == word)
    assert itself.rows[2].metrics["control"].value == row.layout_result.reached_RN[-1].mean()


def test_the_report_of_all_tasks(itself, tmp_path):
    write_report(tmp_path, itself, PROMPTS, {"seeds": 2})
    text = (tmp_path / "report.md").read_text()
    groups = {
        name: heading
        for name, (heading, _) in GROUPS.items()
        if name not in ("learned", "external")
    }
    for heading in groups.values():
        assert f"\n## {heading}\n" in text
    # The summary and a table for each section, all of them of all rows.
    header = "| | teacher, 4 steps | teacher, 4 steps | student, 4 steps |"
    assert text.count(header) == 1 + len(groups)
    page = (tmp_path / "report.html").read_text()
    assert all(metric.title.replace("'", "&#39;") in page for metric in itself.catalogue.values())
    for name in ("samples.png", "control.png", "interpolation.png"):
        assert f"![]({name})" in text
        assert Image.open(tmp_path / name).width > 6 * 96
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"]["student"]["metrics"]["retrieval"]["value"] == 1


def test_strips_and_differences(itself, teacher):
    """Of a teacher as its own student: the same pictures, no difference; ends in known noises."""
    first, _, same = itself.rows
    assert itself.strips == [0, 2] and not same.differences_P.any()
    assert first.differences_P is None
    np.testing.assert_array_equal(first.strips_KMNHWC, same.strips_KMNHWC)
    path, direction = first.strips_KMNHWC[1]
    own = first.images_PSHWC[2].astype(int)
    for strip, place, seed in ((path, 0, 0), (path, -1, 1), (direction, 4, 0)):
        assert np.abs(strip[place].astype(int) - own[seed]).max() <= 1
    assert np.abs(direction[0].astype(int) - own[0]).max() > 1


def test_a_seed_is_that_of_the_sample_command(itself, teacher):
    noise = initial_noise(1, 3, teacher.pipeline.latent)
    alone = draw(teacher, PROMPTS, noise)
    np.testing.assert_allclose(
        from_uint8(itself.rows[2].images_PSHWC[:, 1]), alone.clip(-1, 1), atol=LEVEL
    )


def test_prompts_that_the_oracle_cannot_parse(teacher):
    def parse(caption):
        raise InputError(f"caption: found {caption!r}; expected another")

    world = World(Oracle(("side",), classify, parse))
    with pytest.raises(InputError, match="prompts: caption: found 'red circle'"):
        evaluate(teacher, teacher, PROMPTS, world, EvaluationConfig())


def test_pictures_that_are_not_finite(teacher):
    broken = {**teacher.params, "vae": dict(teacher.params["vae"])}
    broken["vae"]["post_quant_conv"] = {
        name: np.full_like(x, np.nan) for name, x in broken["vae"]["post_quant_conv"].items()
    }
    broken = replace(teacher, name="--teacher x", params=broken)
    with pytest.raises(InputError, match="--teacher x: found pictures that are not finite"):
        evaluate(broken, teacher, PROMPTS, World(), EvaluationConfig(2, 0))


@pytest.mark.parametrize("moves", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_bundled_world_from_the_command_line(tmp_path, capsys, moves):
    """The bundled teacher as its own student, in few steps; gradients are slow to compile."""
    student = tmp_path / "student"
    shutil.copytree(resolve("asset:shapes_teacher"), student)
    sampling = {"timesteps": [899, 449], "guidance": 1.0, "length": 16}
    (student / "gadjax.json").write_text(json.dumps(sampling))
    prompts, out = tmp_path / "prompts.txt", tmp_path / "report"
    prompts.write_text("a large red circle\na small shape at the left\n")
    given = {"teacher": "asset:shapes_teacher", "student": student, "prompts": prompts, "out": out}
    given |= {"seeds": 2, "tangents": 0, "library": 4, "moves": moves, "teacher-steps": 4}
    assert main(["evaluate", "--json", *(f"--{k}={v}" for k, v in given.items())]) == 0
    report = json.loads(capsys.readouterr().out)
    student, absent = report["rows"]["student"]["metrics"], report["absent"]
    for name in ("retrieval", "retrieval_position", "path_agreement", "coverage"):
        assert 0 <= student[name]["low"] <= student[name]["value"] <= student[name]["high"]
    assert {"frechet", "tangent_cosine", "tangent_norm_ratio"} <= set(absent)
    assert (out / "interpolation.png").exists()
    if moves:
        assert student["control_angle"]["value"] > 1 and (out / "control.png").exists()
    else:
        assert absent["control"] == "no moves asked for" and not (out / "control.png").exists()
