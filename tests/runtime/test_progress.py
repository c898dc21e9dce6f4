"""Progress: lines, metrics.jsonl, trackers, and no wait for the newest step."""

import io
import json
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from train_runs import rows

from gadjax.errors import RunStopped
from gadjax.runtime.goodput import GoodputClock
from gadjax.runtime.progress import Progress, parameter_table
from gadjax.runtime.status import HEALTH
from gadjax.training.config import default_config


def report(workdir, steps, start=0, batch=1, every=1, **more):
    config = default_config()
    config.steps, config.batch, config.log.every = steps, batch, every
    return Progress(workdir, config, start, **more)


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)


def test_metrics_and_lines_without_a_terminal(tmp_path, capsys):
    with report(tmp_path, 7, batch=4, every=3) as progress:
        progress.note("first\nsecond")
        for step in range(1, 8):
            progress.update(step, {"loss": jnp.float32(step / 2), "bad": jnp.int32(0)})
    metrics_rows = rows(tmp_path)
    assert [row["step"] for row in metrics_rows] == [3, 6, 7]
    assert [row["loss"] for row in metrics_rows] == [1.5, 3.0, 3.5]
    assert all(row["images_per_second"] > 0 and row["bad"] == 0 for row in metrics_rows)
    assert abs(metrics_rows[0]["time"] - time.time()) < 60
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["first", "second"] and len(lines) == 5
    assert lines[2].startswith("step 3/7  loss 1.5  bad 0  ")
    assert "images/s" in lines[2] and "ETA 0:00:" in lines[2]
    logged = (tmp_path / "train.log").read_text()
    assert all(line in logged for line in lines)


def test_rate_leaves_out_the_first_step(tmp_path, monkeypatch):
    clock = iter([100.0, 102.0, 104.0])
    progress = report(tmp_path, 3, batch=8, every=1)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    for step in (1, 2, 3):
        progress.update(step, {"loss": 1.0})
    progress.close()
    assert [row["images_per_second"] for row in rows(tmp_path)] == [None, 4.0, 4.0]
    assert [row["time"] for row in rows(tmp_path)] == [100.0, 102.0, 104.0]


def test_images_are_the_students_samples_between_two_rows(tmp_path, monkeypatch):
    """Whatever the critic does in a step, and however often a row is due."""
    clock = iter([100.0, 104.0, 112.0])  # of steps 1, 2 and 4, which are read
    config = default_config()
    config.steps, config.batch, config.log.every, config.critic.updates = 4, 8, 2, 5
    progress = Progress(tmp_path, config)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    for step in (1, 2, 3, 4):
        progress.update(step, {"loss": 1.0})
    progress.close()
    assert [(row["step"], row["images_per_second"]) for row in rows(tmp_path)] == [(2, 2), (4, 2)]


class Running:
    """A value still being computed: reading it before its step is done is an error."""

    done = 0

    def __init__(self, step):
        self.step = step

    def __float__(self):
        assert self.step <= Running.done, f"waited for step {self.step}"
        return float(self.step)


def test_never_waits_for_the_newest_step(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.device_get", lambda tree: tree)
    progress = report(tmp_path, 6, every=1)
    for step in range(1, 7):
        Running.done = step - 1
        progress.update(step, {"loss": Running(step)})
    Running.done = 6
    progress.close()
    assert [row["loss"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_resume_appends_and_repeats_no_step(tmp_path):
    for start, stop in ((0, 5), (3, 8)):
        with report(tmp_path, 10, start, every=1) as progress:
            for step in range(start + 1, stop + 1):
                progress.update(step, {"run": float(start)})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "lo')  # a kill in the middle of a line
    with report(tmp_path, 10, 8, every=1):
        pass
    assert [(row["step"], row["run"]) for row in rows(tmp_path)] == [
        (step, 0.0 if step <= 3 else 3.0) for step in range(1, 9)
    ]


def test_non_finite_metrics_are_valid_json(tmp_path, capsys):
    with report(tmp_path, 2, every=1) as progress:
        progress.update(1, {"loss": jnp.float32(np.nan)})
        progress.update(2, {"loss": jnp.float32(np.inf)})

    def refuse(text):
        raise AssertionError(text)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["loss"] is None
    assert "loss nan" in capsys.readouterr().err


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with report(tmp_path, 4, 1, every=2) as progress:
        for step in (2, 3):
            progress.update(step, {"loss": 0.25})
        progress.note("a preview was written")
        progress.update(4, {"loss": 0.125})
    text = screen.getvalue()
    assert "4/4" in text and "loss 0.125" in text
    assert "a preview was written\n" in text
    assert "step 2/4" not in text and "step 2/4" in (tmp_path / "train.log").read_text()


def test_rows_of_previews_go_to_a_file_and_to_the_trackers(tmp_path, monkeypatch):
    """A resumed run draws the preview of its first step again: its row is not kept."""
    sent = []
    monkeypatch.setattr(
        "gadjax.runtime.progress.Trackers.write_scalars", lambda _, step, row: sent.append(row)
    )
    made = [{"step": n, "x0_rms": n / 2, "low_band": None, "alarms": []} for n in (0, 2, 4)]
    with report(tmp_path, 4) as progress:
        for row in made[:2]:
            progress.health(row)
    with report(tmp_path, 4, start=2) as progress:
        for row in made[1:]:
            progress.health(row)
    lines = (tmp_path / HEALTH).read_text().splitlines()
    assert [json.loads(line) for line in lines] == made
    assert sent == [{"health/x0_rms": n / 2} for n in (0, 2, 2, 4)]
    with report(tmp_path / "other", 4, enabled=False) as progress:
        progress.health(made[0])
    assert not (tmp_path / "other").exists()


def test_other_processes_report_nothing(tmp_path, capsys):
    with report(tmp_path / "w", 2, every=1, enabled=False) as progress:
        progress.note("hello")
        progress.update(1, {"loss": 1.0})
        progress.image(1, "x", np.zeros((2, 2, 3), np.uint8))
    assert not (tmp_path / "w").exists() and capsys.readouterr().err == ""


def test_goodput_is_in_every_row_and_in_the_record(tmp_path):
    now = iter(range(100))  # every reading of the clock takes a second
    with report(tmp_path, 4, clock=GoodputClock(lambda: float(next(now)))) as progress:
        for step in (1, 2, 3, 4):
            progress.update(step, {"loss": 1.0})
    shares = [row["goodput"] for row in rows(tmp_path)]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] < 1
    record = json.loads((tmp_path / "goodput.json").read_text())
    assert record["step"] == 4 and record["starts"] == 1
    total = sum(record["seconds"].values())
    assert total == next(now) - 1 and record["seconds"]["step"] / total >= shares[-1]


def test_trackers_get_scalars_and_images_and_may_fail(tmp_path, monkeypatch, capsys):
    calls = []

    class Fake:
        def __init__(self, workdir, config, note):
            note("wandb stopped: it could not")

        def write_scalars(self, *args):
            calls.append(args)

        def write_images(self, step, images):
            calls.append((step, {name: array.shape for name, array in images.items()}))

        def close(self):
            calls.append("close")

    monkeypatch.setattr("gadjax.runtime.progress.Trackers", Fake)
    with report(tmp_path, 9, every=4) as progress:
        progress.update(4, {"loss": 2.0})
        progress.image(4, "preview", np.zeros((2, 3, 3), np.uint8))
        progress.update(5, {"loss": 3.0})
    goodput = rows(tmp_path)[0]["goodput"]
    scalars = (4, {"loss": 2.0, "goodput": goodput})
    assert calls == [(4, {"preview": (1, 2, 3, 3)}), scalars, "close"]
    assert "wandb stopped: it could not" in capsys.readouterr().err


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunStopped, match="file/work: cannot be written: Not a directory"):
        report(tmp_path / "file" / "work", 1)


def test_parameter_table():
    table = parameter_table({"blocks": {"kernel": jnp.zeros((3, 4, 5)), "bias": jnp.zeros((7,))}})
    assert "blocks/kernel" in table and "(3, 4, 5)" in table and "Total: 67" in table
