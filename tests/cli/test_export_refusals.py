"""Refusals of an export: one line for whatever is wrong with its inputs, before it is made."""

import json
import shutil

import jax
import pytest
from checkpoints import same, state
from workdirs import make_workdir

from gadjax.formats.diffusers_folder import check_pipeline, read_pipeline
from gadjax.formats.diffusers_writer import write_pipeline
from gadjax.formats.state_dict import tensors_from_params
from gadjax.formats.weights import fingerprint
from gadjax.pipelines import parity


def test_the_report_is_of_these_weights(workdir, tmp_path, gadjax, fails, monkeypatch):
    monkeypatch.setattr(parity, "missing", lambda: ["torch"])
    out, report = tmp_path / "student", tmp_path / "report.json"
    gadjax("export", "--workdir", workdir, "--out", out)
    part = read_pipeline(out).components["transformer"]
    metrics = {"adherence": {"value": 0.5, "low": 0.25, "high": 0.75}}
    metrics |= {"pairwise_distance": {"value": 2.0, "low": None, "high": None}}
    content = {
        "settings": {
            "student's transformer": fingerprint(tensors_from_params(part.params, part.keymap))
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
    before, after, converted = tmp_path / "before", tmp_path / "after", tmp_path / "own"
    shutil.copytree(tiny_pipeline, before)
    workdir = make_workdir(tmp_path / "run", before)
    before.rename(after)
    gadjax("convert", after, converted)
    out = tmp_path / "student"
    flags = ["--workdir", workdir, "--out", out]
    fails(["export", *flags], 2, before, "no such folder", "--teacher", out=out)
    for teacher in (after, converted):
        gadjax("export", *flags, "--teacher", teacher, "--overwrite")
        assert same(state(out, "vae"), state(tiny_pipeline, "vae"))
    shutil.rmtree(out)
    doubled = jax.tree.map(lambda x: 2 * x, read_pipeline(after).components["transformer"].params)
    pipeline = check_pipeline(tiny_pipeline)
    write_pipeline(pipeline, after, {"transformer": doubled}, overwrite=True)
    fails(["export", *flags, "--teacher", after], 2, after / "transformer", out=out)


def test_what_is_exported_has_the_modes_of_new_files(tiny_pipeline, tmp_path, gadjax, monkeypatch):
    """Read-only files of a teacher ended the export of whoever is not root."""
    monkeypatch.setattr(parity, "missing", lambda: ["torch"])
    teacher, out = shutil.copytree(tiny_pipeline, tmp_path / "teacher"), tmp_path / "student"
    workdir = make_workdir(tmp_path / "run", teacher)
    for path in [*teacher.rglob("*"), teacher]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    gadjax("export", "--workdir", workdir, "--out", out)
    (tmp_path / "new").touch()
    mode = (tmp_path / "new").stat().st_mode
    assert {path.stat().st_mode for path in out.rglob("*") if path.is_file()} == {mode}
    assert all(path.stat().st_mode & 0o200 for path in out.rglob("*"))
    for path in [teacher, *teacher.rglob("*")]:
        path.chmod(0o755)


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
    workdir = make_workdir(tmp_path / "run", tiny_pipeline, timesteps=(899.5, 449.0))
    out = tmp_path / "out"
    fails(["export", "--workdir", workdir, "--out", out], 2, "899.5", "whole numbers", out=out)
