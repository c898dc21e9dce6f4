"""Workdirs whose files have contents that no run writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_inputs import NOW, config, make_run, refused

from gadjax.errors import InputError, RunStopped
from gadjax.io.manifest import COMMIT_MARKER
from gadjax.runtime.goodput import GoodputClock
from gadjax.runtime.status import read_status, table
from gadjax.runtime.trackers import _run_id
from gadjax.training.config import as_json
from gadjax.training.resume import check_resume
from gadjax.training.workdir import parse_run_metadata


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("status.json", "step", "12"),
        ("status.json", "step", -1),
        ("status.json", "time", 1e300),
        ("status.json", "time", None),
        ("status.json", "text", ["a"]),
        ("status.json", "steps", 10**4000),
        ("run.json", "devices", 0),
        ("run.json", "device", {"a": 1}),
        ("run.json", "peak_flops", 1e-320),
        ("goodput.json", "seconds", {"step": 1}),
        ("goodput.json", "seconds", 3),
        ("goodput.json", "starts", "x"),
        ("config.json", "log", 3),
        ("config.json", "log", {"every": []}),
        ("metrics.jsonl", "images_per_second", 1e-300),
        ("metrics.jsonl", "images_per_second", "fast"),
        ("metrics.jsonl", "time", -1e29),
        ("metrics.jsonl", "step", 2.5),
        ("metrics.jsonl", "loss/\x1b[2J", 1.0),
        ("metrics.jsonl", "loss/dmd", [1]),
        ("health.jsonl", "step", "x"),
        ("health.jsonl", "alarms", {"a": 1}),
        ("health.jsonl", "alarms", ["\x1b[2J", 3]),
        ("health.jsonl", "x0_rms", 10**400),
        ("health.jsonl", "x0_rms_teacher", [1]),
        ("health.jsonl", "\u2028", 1.0),
    ],
)
def test_a_value_that_makes_no_sense_is_unknown(tmp_path, name, key, value):
    make_run(tmp_path)
    lines = (tmp_path / name).read_text().splitlines()
    sane = read_status(tmp_path, NOW)
    (tmp_path / name).write_text(
        "\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | {key: value})])
    )
    found = read_status(tmp_path, NOW)
    assert json.loads(json.dumps(found, allow_nan=False))["state"] == "running"
    assert found["checkpoint"] == sane["checkpoint"] and found["preview"] == sane["preview"]
    assert all(line.isprintable() for line in table(found).split("\n"))


def test_status_of_what_vanishes_and_of_odd_names(tmp_path):
    make_run(tmp_path)
    for name in ("1²", "٣", "7", "9" * 200):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "1²" / COMMIT_MARKER).write_text("")
    (tmp_path / "checkpoints" / "7" / COMMIT_MARKER).symlink_to("gone")
    assert read_status(tmp_path, NOW)["checkpoint"]["step"] == 20
    for batch in (0, -1, None, "8", True):
        (tmp_path / "config.json").write_text(json.dumps({"steps": 3, "batch": batch}))
        refused(lambda: read_status(tmp_path, NOW), "found no config.json of a run; expected")


def test_a_clock_that_cannot_be_resumed_is_replaced(tmp_path):
    make_run(tmp_path)
    text = (tmp_path / "goodput.json").read_text()
    for old, new in (('"step": 80.0', '"step": Infinity'), ('"steps": 40', '"steps": 1e400'),
                     ('"starts": 2', '"starts": -2'), ('"lost": 1.0', '"lost": NaN')):  # fmt: skip
        assert old in text
        (tmp_path / "goodput.json").write_text(text.replace(old, new))
        clock = GoodputClock()
        clock.resume(tmp_path, 10)
        assert clock.starts == 1 and 0 <= clock.share() <= 1
    (tmp_path / "goodput.json").write_text(text)
    clock = GoodputClock()
    clock.resume(tmp_path, 40)
    assert clock.starts == 3 and clock.share() > 0.7


def test_trackers_names_that_are_none(tmp_path):
    for text in ("3", '{"wandb": 3}', "[[1, 2]]", "[" * 100_000):
        (tmp_path / "trackers.json").write_text(text)
        name = _run_id(tmp_path, "wandb")
        assert len(name) == 8 and _run_id(tmp_path, "wandb") == name


def test_another_config_is_named_in_one_line(tmp_path):
    saved = as_json(config())
    for key, value in (
        *(("teacher", "\x1b[2J" * 1000), ("objective", {"a\nb": [[[[[[1]]]]]]}), ("optim", 3)),
        *(("data", {"prompts": "x" * 10_000}), ("seed", None), ("\u202e", 1)),
    ):
        with pytest.raises(InputError, match="belongs to another config") as caught:
            check_resume(saved | {key: value}, config(), tmp_path)
        assert str(caught.value).isprintable() and len(str(caught.value)) <= 2000


BAD_LORAS = (
    *(3, None, {}, {"rank": 1}),
    *({"rank": x, "alpha": None, "targets": "x"} for x in ("1", -1, 2.5, True, 10**30, [1])),
    *({"rank": 4, "alpha": x, "targets": "x"} for x in ("1", -1, 0, float("nan"), [1])),
    *({"rank": 4, "alpha": None, "targets": x} for x in (3, "(", [1])),
)


@pytest.mark.parametrize(
    "change",
    [
        *({"teacher": x} for x in (3, None, ["a"])),
        *({"student": x} for x in (3, {}, {"timesteps": 3}, {"timesteps": [None]})),
        *({"student": {"timesteps": x}} for x in ([], ["a"], [float("nan")], [1e300], [True, 1])),
        *({"objective": x} for x in (3, {}, {"dmd": 3}, {"\x1b": {}}, {"dmd": {"weight": "1"}})),
        *({"objective": {"gad": {"steps": x}}} for x in ("1", None, [1])),
        *({"data": x} for x in (3, {}, {"length": 0, "world": ""}, {"length": 5, "world": 3})),
        *({"guidance": x} for x in ("a", None, float("inf"))),
        *({"batch": x} for x in ("8", 0, True, 10**30)),
        *({"student": as_json(config())["student"] | {"lora": x}} for x in BAD_LORAS),
        *({"critic": as_json(config())["critic"] | {"lora": x}} for x in BAD_LORAS),
        *({"student": as_json(config())["student"] | {"layers": x}} for x in (3, None, "a", [-1])),
        *({"student": as_json(config())["student"] | {"rollout": x}} for x in (3, None, ["ode"])),
    ],
    ids=str,
)
def test_a_checkpoint_of_an_impossible_run_is_refused(change):
    meta = {"config": as_json(config()), "teacher": "a" * 32}
    parse_run_metadata(meta, "here")
    changed = meta | {"config": meta["config"] | change}
    refused(lambda: parse_run_metadata(changed, "here"), "^here: ")


@pytest.mark.parametrize("meta", [None, 3, [], {}, {"config": {}}, {"config": 3, "teacher": "a"}])
def test_a_checkpoint_without_its_config_is_refused(meta):
    refused(
        lambda: parse_run_metadata(meta, "here"), "^here: found another config or teacher; expected"
    )


def test_names_that_a_terminal_cannot_show(tmp_path):
    """A folder that is no UTF-8, named on a terminal that has ASCII only."""
    folder = os.fsencode(tmp_path) + b"/\xff\xe9"
    os.mkdir(folder)
    make_run(Path(os.fsdecode(folder)))
    command = [sys.executable, "-m", "gadjax", "status", folder]
    done = subprocess.run(
        command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    assert b"step" in done.stdout and b"\x1b" not in done.stdout and b"udcff" in done.stdout


def test_a_run_that_is_refused_is_not_a_traceback(tmp_path):
    """RunStopped is the other way to refuse."""
    from gadjax.training.workdir import read_trained

    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises((InputError, RunStopped)) as caught:
        read_trained(tmp_path)
    assert str(caught.value).isprintable()
