"""gadjax launch: refusals, and the call of the supervisor."""

import sys
from pathlib import Path

import pytest
from programs import run_python

from gadjax.cli.main import main
from gadjax.io.storage import as_path
from gadjax.runtime.supervisor import Limits


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes", "0", "--", "train"], "--processes: found 0; expected 1 or more"),
        (["--hang", "-1", "--", "train"], "--hang: found -1; expected 0 or more seconds"),
        (["--grace", "nan", "--", "train"], "--grace: found nan; expected 0 or more seconds"),
        (["--grace", "x", "--", "train"], "--grace: invalid float value"),
        ([], "found 'nothing'; expected -- train"),
        (["--"], "found '--'; expected -- train"),
        (["--", "plan", "--hang", "1"], "found '-- plan'; expected -- train"),
        (["--loud", "--", "train"], "found '--loud --'; expected -- train"),
        (["train"], "found 'train'; expected -- train"),
        (["--logs", "FILE", "--", "train"], "FILE: found File exists; expected a folder for logs"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    assert main(["launch", *arguments]) == 2
    err_line = capsys.readouterr().err
    assert words in err_line and err_line.count("\n") == 1


def test_the_command_starts_train_and_names_its_logs(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr("gadjax.cli.launch.supervise", lambda *given: calls.append(given) or 0)
    train = ["train", "--config", "c.py", f"--workdir={tmp_path / 'run'}", "--config.a=1"]
    assert main(["launch", "--processes", "2", "--hang", "5", "--", *train]) == 0
    command = [sys.executable, "-m", "gadjax", *train]
    logs = tmp_path / "run.logs"
    assert calls == [([command, command], Limits(5, 30), logs, tmp_path / "run")]
    assert logs.is_dir() and str(logs) in capsys.readouterr().err
    assert main(["launch", "--", "train", "--workdir", "gs://bucket/run"]) == 0
    assert calls[1][1:] == (Limits(), None, as_path("gs://bucket/run"))


def test_it_needs_no_jax():
    code = "import sys; from gadjax.cli import launch, main; sys.exit('jax' in sys.modules)"
    run_python("-c", code)
