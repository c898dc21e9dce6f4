"""gadjax plan as a user calls it, for a GPU that this machine's CPU stands in for."""

import json

import pytest
from programs import run_python

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


def test_stdout_is_json_only(capsys, monkeypatch):
    """Without prompts too, and on one device, so that no other process is needed."""
    monkeypatch.setattr(hardware, "CUDA_PLUGINS", ("jax_plugins.none",))
    assert main(["plan", "--topology=gpu:1", "--json", *ARGUMENTS]) == 0
    out, err = capsys.readouterr()
    planned = json.loads(out)
    assert planned["estimate"] and planned["chips"] == 1 and planned["replicated"] is None
    assert planned["memory"]["fits"] and planned["updates"] == {"student": 1}
    assert planned["traffic"] == {"step": {"student": {}}, "update": 0, "unknown_loops": 0}
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


def test_absent_gpus_are_cpu_devices_of_another_process():
    """The number of CPU devices is fixed before JAX starts."""
    code = (
        "from gadjax.parallel.hardware import find_topology;"
        "print(len(find_topology('h200:3').devices()))"
    )
    assert run_python("-c", code).stdout == "3\n"
