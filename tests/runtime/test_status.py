"""gadjax status: the status of a run, from its workdir."""

import json
import os

import pytest
from programs import run_python

from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.parallel.hardware import CHIPS, peak_flops
from gadjax.runtime.status import read_status, table

NOW = 1_000_000.0
RUN = {
    "devices": 4,
    "device": "TPU v5 lite",
    "processes": 2,
    "flops_per_step": 394e12,
    "peak_flops": 197e12,
    "images_per_step": 8,
}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_status(workdir, status, step, time, **more):
    record = {"status": status, "step": step, "steps": 100, "time": time, "text": status}
    write(workdir / "status.json", record | more)


@pytest.fixture
def workdir(tmp_path):
    """A run that is at step 40 of 100: 8 images a step, 4 seconds a step, a line every 2 steps."""
    folder = tmp_path / "run"
    write(folder / "config.json", {"steps": 100, "batch": 8, "log": {"every": 2}})
    write_status(folder, "running", 30, NOW - 60)
    write(folder / "run.json", RUN)
    rows = [
        {
            "step": step,
            "time": NOW - 4 * (41 - step),
            "images_per_second": 2.0 if step > 2 else None,
        }
        | {"goodput": 0.8, "loss/gad": step / 2, "loss/dmd": None}
        for step in range(2, 41, 2)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 42, "lo'
    (folder / "metrics.jsonl").write_text(text)
    kinds = {"compile": 10, "step": 80, "data": 4, "checkpoint": 3, "preview": 2, "lost": 1}
    write(folder / "goodput.json", {"step": 40, "steps": 40, "starts": 2, "seconds": kinds})
    for step in (20, 30):
        write(folder / "checkpoints" / str(step) / "commit_success.txt", {})
        os.utime(
            folder / "checkpoints" / str(step) / "commit_success.txt", (NOW - 600, NOW - 10 * step)
        )
    for name in ("40", "damaged", "50.orbax-checkpoint-tmp-1"):  # not committed, or not in place
        (folder / "checkpoints" / name).mkdir()
    write(folder / "checkpoints" / "50.orbax-checkpoint-tmp-1" / "commit_success.txt", {})
    for step in (0, 20):
        write(folder / "previews" / f"{step:07d}.png", {})
    return folder


def test_status_of_a_run(workdir):
    fields = read_status(workdir, NOW)
    expected = {
        "state": "running",
        "step": 40,
        "steps": 100,
        "eta_seconds": 240,
        "images_per_second": 2,
        "images_per_second_per_chip": 0.5,
        "seconds_per_step": 4,
        "utilisation": 394 / 4 / (4 * 197),
        "metrics": {"loss/gad": 20, "loss/dmd": None},
        "checkpoint": {"step": 30, "age_seconds": 300},
        "preview": str(workdir / "previews" / "0000020.png"),
        "seconds_since_news": 4,
        "warning": None,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["goodput"]["step"] == 0.8 and sum(fields["goodput"].values()) == pytest.approx(1)
    text = table(fields)
    for words in (
        "running",
        "40 / 100 (40%)",
        "0:04:00",
        "2 images/s, 0.5 per chip, 4 s/step",
        "4 x TPU v5 lite in 2 processes",
        "12.5% of the bfloat16 peak",
        "loss/gad 20  loss/dmd not finite",
        "step 80.0%  data 4.0%",
        "(2 starts)",
        "step 30, 0:05:00 ago",
        "0000020.png",
    ):
        assert words in text
    assert "WARNING" not in text


def test_a_run_without_news_gets_a_warning(workdir):
    assert read_status(workdir, NOW + 60)["warning"] is None  # within a minute and 12 steps
    fields = read_status(workdir, NOW + 600)
    assert "no news for 0:10:04" in fields["warning"] and "WARNING" in table(fields)
    write_status(workdir, "preempted", 40, NOW, text="preempted at step 40")
    fields = read_status(workdir, NOW + 600)
    assert fields["warning"] is None and fields["eta_seconds"] is None
    assert "preempted at step 40" in table(fields)


def test_a_compiling_start_gets_more_time(workdir):
    write_status(workdir, "running", 40, NOW)  # resumed: no line of this start yet
    assert read_status(workdir, NOW + 1200)["warning"] is None
    assert read_status(workdir, NOW + 7200)["warning"]


def test_unknown_hardware(workdir):
    write(workdir / "run.json", RUN | {"device": "cpu", "peak_flops": None})
    fields = read_status(workdir, NOW)
    assert fields["utilisation"] is None and "unknown hardware" in table(fields)
    assert peak_flops("cpu") is None
    assert (
        peak_flops("TPU v5 lite") == CHIPS["v5e"].peak and peak_flops("TPU v5") == CHIPS["v5p"].peak
    )


def test_a_run_that_has_just_begun(workdir):
    for name in ("status.json", "run.json", "metrics.jsonl", "goodput.json"):
        (workdir / name).unlink()
    fields = read_status(workdir, NOW)
    assert fields["state"] == "unknown" and fields["step"] == 0 and fields["warning"] is None
    assert "0 / 100" in table(fields)
    for half in ("", "{", "[1]"):
        (workdir / "status.json").write_text(half)
        assert read_status(workdir, NOW)["state"] == "unknown"


def test_only_the_end_of_long_metrics_is_read(workdir):
    first = json.dumps({"step": 1, "time": 1.0, "images_per_second": 9.0}) + "\n"
    line = json.dumps({"step": 2, "time": 1.0, "images_per_second": None}) + "\n"
    last = json.dumps({"step": 77, "time": NOW, "images_per_second": None}) + "\n"
    (workdir / "metrics.jsonl").write_text(first + line * 5000 + last)
    fields = read_status(workdir, NOW)
    assert fields["step"] == 77 and fields["images_per_second"] is None


def test_a_missing_workdir_is_bad_input(tmp_path, capsys):
    with pytest.raises(InputError, match="no such folder"):
        read_status(tmp_path / "nothing")
    assert main(["status", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert "no config.json" in line and line.count("\n") == 1


def test_the_command_needs_no_jax(workdir):
    """JAX takes seconds to import, and on a TPU the devices."""
    code = (
        "import sys; from gadjax.cli.main import main; "
        f"code = main(['status', {str(workdir)!r}, '--json']); "
        "assert not {'jax', 'numpy', 'orbax'} & set(sys.modules); sys.exit(code)"
    )
    assert json.loads(run_python("-c", code).stdout)["step"] == 40
