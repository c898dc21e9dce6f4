"""gadjax plan as a user calls it, for a GPU that this machine's CPU stands in for."""

import json

import numpy as np
import pytest
from programs import run_python
from safetensors.numpy import load_file, save_file

from gadjax.assets import resolve
from gadjax.cli.main import main
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.formats.lora_names import layers_of
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


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """Of rank 3, for half of the attentions of the bundled teacher."""
    part = read_pipeline(resolve("asset:shapes_teacher")).components["transformer"]
    tensors = {}
    for name, layer in layers_of(part).items():
        if "attn1.to_q" in name or "attn2.to_k" in name:
            tensors[f"transformer.{name}.lora_A.weight"] = np.ones((3, layer.shape[1]), np.float32)
            tensors[f"transformer.{name}.lora_B.weight"] = np.ones((layer.shape[0], 3), np.float32)
    path = tmp_path_factory.mktemp("loras") / "a.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.slow
def test_a_lora_is_trained_on(capsys, monkeypatch, lora):
    """At its rank and on its modules, or at the config's; as the run with the same keys."""
    monkeypatch.setattr(hardware, "CUDA_PLUGINS", ("jax_plugins.none",))

    def plan(*arguments):
        assert main(["plan", "--topology=gpu:1", "--json", *ARGUMENTS, *arguments]) == 0
        out, err = capsys.readouterr()
        return json.loads(out), err

    found, err = plan(f"--lora={lora}:0.5")
    assert f"{lora}: 12 modules; the student trains adapters of rank 3" in err
    part = read_pipeline(resolve("asset:shapes_teacher")).components["transformer"]
    numbers = sum(
        3 * sum(layer.shape) for name, layer in layers_of(part).items() if "attn1.to_q" in name
    )
    assert found["memory"]["held"]["student parameters"] == 4 * 2 * numbers
    keys = f"--config.student.init={lora}", "--config.student.lora.rank=3"
    same, _ = plan(*keys, "--config.student.lora.targets=attn1/to_q|attn2/to_k")
    assert {k: v for k, v in found.items() if k != "seconds"} == {
        k: v for k, v in same.items() if k != "seconds"
    }
    more, _ = plan(f"--lora={lora}", "--config.student.lora.rank=8")
    assert more["memory"]["held"]["student parameters"] > 8 / 3 * 4 * 2 * numbers
    assert more["flops"]["update"] > found["flops"]["update"]


def test_bad_loras_are_one_line(capsys, lora, tmp_path):
    (tmp_path / "b.safetensors").write_bytes(lora.read_bytes()[:-1])
    tensors = load_file(lora)
    save_file({k: v[..., :1] for k, v in tensors.items()}, tmp_path / "c.safetensors")
    for arguments, words in (
        ([f"--lora={tmp_path}/none"], "none: found No such file"),
        ([f"--lora={tmp_path}/b.safetensors"], "b.safetensors: "),
        ([f"--lora={tmp_path}/c.safetensors"], "c.safetensors: found A (3, 1) and B"),
        ([f"--lora={lora}:x"], "expected FILE or FILE:WEIGHT"),
        ([f"--lora={lora}", "--config.student.lora.rank=2"], "of rank 3 in"),
        ([f"--lora={lora}", "--config.student.init=random"], "--lora: found it with student.init"),
        ([f"--lora={lora}", "--config.teacher="], "teacher: found nothing"),
    ):
        assert main(["plan", "--topology=gpu:1", *ARGUMENTS, *arguments]) == 2, arguments
        out, err = capsys.readouterr()
        assert not out and err.startswith("gadjax: ") and err.count("\n") == 1 and words in err


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
