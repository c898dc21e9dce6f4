"""Training on full disks: `checkpoint.failures`."""

import errno
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from train_runs import steps

from gadjax.checkpoints import checkpoint
from gadjax.checkpoints.restore import read_params
from gadjax.cli.main import main
from gadjax.errors import RunStopped
from gadjax.io.append_file import AppendFile
from gadjax.io.storage import warn_on_write_error, write_atomic
from gadjax.runtime.progress import Progress
from gadjax.training.config import default_config

WRITE_MANIFEST = checkpoint.write_manifest  # which stands here for whatever a save writes


def full(*arguments, **more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train(config: Path, workdir: Path, *more: str) -> int:
    return main(["train", "--config", f"{config}:tdm", "--workdir", str(workdir), *more])


def saves_that_fail(monkeypatch, *steps: int) -> None:
    def write_manifest(folder):
        if int(folder.name.split(".")[0]) in steps:
            full()
        WRITE_MANIFEST(folder)

    monkeypatch.setattr(checkpoint, "write_manifest", write_manifest)


def steps_of(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def read(workdir: Path) -> list[np.ndarray]:
    return [
        leaf
        for part in ("student", "critic", "ema")
        for leaf in jax.tree.leaves(read_params(workdir / "checkpoints", part, 6)[1])
    ]


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("failures") / "whole"
    assert train(config, workdir, "--config.steps=6") == 0
    return workdir


def same_as(undisturbed: Path, workdir: Path) -> bool:
    return all(map(np.array_equal, read(workdir), read(undisturbed))) and steps(workdir) == steps(
        undisturbed
    )


@pytest.mark.slow
def test_a_full_disk_stops_a_run_which_resumes_when_there_is_room(
    config, undisturbed, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    saves_that_fail(monkeypatch, 4)
    assert train(config, workdir, "--config.steps=6") == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"gadjax: stopped: {workdir}/checkpoints/4: cannot be written: No space left on device"
    )
    status = json.loads((workdir / "status.json").read_text())
    assert status["status"] == "stopped" and "No space left" in status["reason"]
    assert "2" in steps_of(workdir) and "4" not in steps_of(workdir)
    monkeypatch.undo()
    assert train(config, workdir, "--config.steps=6") == 0
    assert same_as(undisturbed, workdir)


@pytest.mark.slow
def test_saves_that_may_fail_stop_nothing(config, undisturbed, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    saves_that_fail(monkeypatch, 2, 4)
    failures = "--config.checkpoint.failures=2"
    assert train(config, workdir, "--config.steps=6", failures) == 0
    assert steps_of(workdir) == ["6"] and same_as(undisturbed, workdir)
    logged = (workdir / "train.log").read_text()
    for text in (capsys.readouterr().err, logged):
        for step, number in ((2, 1), (4, 2)):
            words = f"checkpoints/{step}: cannot be written: No space left on device (failure "
            assert text.count(f"{words}{number} of 2 tolerated)") == 1


@pytest.mark.slow
@pytest.mark.parametrize("bad", [(2, 4), pytest.param((6,), marks=pytest.mark.slow)])
def test_one_too_many_and_the_last_stop_a_run(config, tmp_path, monkeypatch, capsys, bad):
    workdir = tmp_path / "run"
    saves_that_fail(monkeypatch, *bad)
    failures = "--config.checkpoint.failures=1"
    assert train(config, workdir, "--config.steps=6", failures) == 3
    line = f"gadjax: stopped: {workdir}/checkpoints/{bad[-1]}: cannot be written: No space left"
    assert line in capsys.readouterr().err
    assert steps(workdir)[: bad[-1]] == list(range(1, bad[-1] + 1))


@pytest.mark.slow
def test_a_damaged_config_is_one_line(config, undisturbed, tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    text = (undisturbed / "config.json").read_text()
    for damaged in (text[:-9], text.replace("{", "[", 1), "", "[]", "\ud800"):
        (workdir / "config.json").write_bytes(damaged.encode("utf-8", "surrogatepass"))
        assert train(config, workdir) == 2
        line = capsys.readouterr().err
        assert f"{workdir}/config.json: " in line and line.count("\n") == 1
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_a_start_on_a_full_disk_is_one_line(config, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    monkeypatch.setattr("gadjax.training.loop.write_json", full)
    assert train(config, workdir) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{workdir}/config.json: cannot be written: No space left on device" in line
    monkeypatch.undo()
    assert train(config, workdir, "--config.steps=1") == 0  # what was left hinders nothing


def fill(file: AppendFile):
    """Fill a run's disk; the return value restores it."""
    room = file.file
    file.file = open("/dev/full", "ab", buffering=0)
    return room


def test_lines_are_buffered_while_the_disk_is_full(tmp_path, caplog):
    file = AppendFile(tmp_path / "lines")
    file.add("one")
    room = fill(file)
    for line in ("two", "three"):
        with pytest.raises(OSError, match="No space left"):
            file.add(line)
    file.file.close()
    file.file = room
    file.add("four")
    assert (tmp_path / "lines").read_text() == "one\ntwo\nthree\nfour\n"
    fill(file)
    with pytest.raises(OSError):
        file.add("five")
    file.close()
    assert f"{tmp_path}/lines: 1 lines could not be written" in caplog.text


def test_half_a_line_is_continued(tmp_path):
    file = AppendFile(tmp_path / "lines")

    class Short:
        """A disk that is full after three bytes."""

        def write(self, data):
            if taken:
                full()
            taken.append(room.write(data[:3]))
            return 3

    taken, room = [], file.file
    file.file = Short()
    with pytest.raises(OSError):
        file.add("seven")
    file.file = room
    file.add("eight")
    file.close()
    assert (tmp_path / "lines").read_text() == "seven\neight\n"


@pytest.mark.parametrize("failures", [0, 5])
def test_a_report_on_a_full_disk(tmp_path, caplog, failures):
    config = default_config()
    config.steps, config.log.every, config.checkpoint.failures = 9, 1, failures
    progress = Progress(tmp_path, config)
    rooms = {name: fill(file) for name, file in progress.files.items()}
    progress.clock.write = full
    progress.update(1, {"loss": 1.0})
    if not failures:
        with pytest.raises(RunStopped, match=r"metrics.jsonl: cannot be written: No space left"):
            progress.update(2, {"loss": 1.0})
        return
    for step in (2, 3, 4):
        progress.update(step, {"loss": 1.0})
    names = "metrics.jsonl", "goodput.json", "train.log"
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path}/{name}: cannot be written now: No space left on device" for name in names
    ]
    for name, room in rooms.items():
        progress.files[name].file = room
    progress.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert (tmp_path / "train.log").read_text().count("step ") == 4


def test_a_failure_is_logged_again_after_recovery(tmp_path, caplog):
    for fails in (True, True, False, True):
        with warn_on_write_error(tmp_path / "x", tolerate=True):
            if fails:
                full()
    assert len(caplog.records) == 2
    with pytest.raises(RunStopped, match="x: cannot be written: No space left on device$"):
        with warn_on_write_error(tmp_path / "x"):
            full()


def test_an_atomic_write_leaves_no_partial_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", "old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_metrics_with_a_flipped_byte_can_be_continued(tmp_path):
    config = default_config()
    config.steps, config.log.every = 9, 1
    good = json.dumps({"step": 1, "loss": 1.0}).encode()
    lines = [good, b'{"step": 2, "lo\xffs": 1.0}', b'{"step": Infinity}', b"[" * 10**5, b"\xc3\x28"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with Progress(tmp_path, config, 3) as progress:
        progress.update(4, {"loss": 1.0})
    assert steps(tmp_path) == [1, 2, 4]
