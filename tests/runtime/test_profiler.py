"""Profiler traces: their steps, and that they neither delay nor stop a run otherwise."""

import jax
import pytest
from tiny_run import config_file

from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.runtime.profiler import Profile, parse_profile


@pytest.fixture
def calls(monkeypatch):
    """Calls of JAX, in order."""
    made = []
    monkeypatch.setattr(jax, "block_until_ready", lambda state: made.append(("wait", state)))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: made.append(str(folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


def walk(profile, first, last):
    """Loop of a run whose state is the number of steps done."""
    for done in range(first, last):
        profile.before_step(done, done)
    profile.close(last, last)


def test_the_trace_has_the_requested_steps(calls, tmp_path):
    notes = []
    walk(Profile((3, 2), tmp_path, notes.append), 0, 9)
    assert calls == [("wait", 3), str(tmp_path / "profile"), ("wait", 5), "stop"]
    assert notes == [f"profile of steps 4 to 5: {tmp_path / 'profile'}"]


def test_the_trace_ends_with_the_run(calls, tmp_path):
    notes = []
    walk(Profile((3, 9), tmp_path, notes.append), 0, 5)
    assert calls[-2:] == [("wait", 5), "stop"] and notes[0].startswith("profile of steps 4 to 5:")


def test_without_a_trace_nothing_waits(calls, tmp_path):
    walk(Profile(None, tmp_path, print), 0, 9)
    assert calls == []


def test_steps_before_the_start_of_the_run(calls, tmp_path):
    notes = []
    walk(Profile((3, 2), tmp_path, notes.append), 4, 9)
    assert calls == [] and notes == ["no profile: found step 4; expected to begin at 3"]


def test_an_error_of_the_profiler_ends_only_the_trace(calls, tmp_path, monkeypatch):
    def fail(folder):
        raise RuntimeError("only one profile\nat a time")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    notes = []
    walk(Profile((3, 2), tmp_path, notes.append), 0, 9)
    assert calls == [("wait", 3)]
    assert notes == ["no profile: RuntimeError: only one profile at a time"]


@pytest.mark.parametrize("text", ["a:b", "-1:2", "3:0", "3", "3:", "1:2:3", "", "9:1"])
def test_bad_values_are_refused(text):
    assert parse_profile("8:1", 9) == (8, 1)
    with pytest.raises(InputError, match="--profile: found"):
        parse_profile(text, 9)


def test_the_command_refuses_bad_values_before_any_work(tmp_path, capsys):
    path = config_file(tmp_path / "c.py")
    run = tmp_path / "run"
    assert main(["train", "--config", str(path), "--workdir", str(run), "--profile=3:0"]) == 2
    line = capsys.readouterr().err
    assert "--profile" in line and line.count("\n") == 1 and not run.exists()
