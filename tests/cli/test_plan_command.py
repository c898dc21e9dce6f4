"""gadjax plan as a user calls it, for a card that stands on this machine's CPU."""

import json
import subprocess
import sys

import pytest

from gadjax.cli.main import main
from gadjax.parallel import hardware

ARGUMENTS = (
    "--config=configs/shapes_gad.py:regression",
    "--config.batch=2",
    "--config.student.steps=1",
    "--config.student.timesteps=(999,)",
    "--config.data.prompts=",
    "--config.preview.every=0",
)


@pytest.fixture(autouse=True)
def here(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def test_json_is_all_that_stdout_holds(capsys, monkeypatch):
    """Without prompts too, and on one device, so that no other process is needed."""
    monkeypatch.setattr(hardware, "CUDA_PLUGINS", ("jax_plugins.none",))
    assert main(["plan", "--topology=gpu:1", "--json", *ARGUMENTS]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["estimate"] and found["chips"] == 1 and found["replicated"] is None
    assert found["memory"]["fits"] and found["updates"] == {"student": 1}
    assert found["traffic"] == {"step": {"student": {}}, "update": 0, "unknown_loops": 0}
    assert "compiling the student step" in err


def test_bad_input_is_one_line(capsys):
    for arguments, words in (
        (["--topology=v5e:3x3"], "--topology: found 'v5e:3x3'; expected"),
        (["--topology=gpu:1", "--utilisation=0"], "--utilisation: found 0.0"),
        (["--topology=gpu:1", "--utilisation=much"], "--utilisation"),
        (["--topology=gpu:1", "--config.colour=1"], "colour"),
        (["--topology=gpu:1", "--config.mesh.fsdp=3"], "(mesh.fsdp=1 would, where 3 does not)"),
        ([], "--topology"),
    ):
        assert main(["plan", *ARGUMENTS, *arguments]) == 2, arguments
        out, err = capsys.readouterr()
        assert not out and err.startswith("gadjax: ") and err.count("\n") == 1 and words in err


def test_cards_that_are_not_here_are_cpus_of_another_process():
    """What fixes their number is done before JAX starts."""
    code = (
        "from gadjax.parallel.hardware import find_topology;"
        "print(len(find_topology('h200:3').devices()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "3\n", done.stderr
