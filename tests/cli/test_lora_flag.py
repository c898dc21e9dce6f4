"""--lora of the commands: a student's adapters go out, and come back as the student."""

import json

import numpy as np
import pytest
from PIL import Image
from train_runs import train

from gadjax import load
from gadjax.cli.main import main
from gadjax.formats.diffusers_folder import read_pipeline

# So large a factor and rate that two updates show in the pictures.
LORA = (
    *("--config.student.lora.rank=4", "--config.student.lora.alpha=32.0"),
    *("--config.optim.lr=0.03", "--config.steps=2"),
)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    assert train(f"{config}:regression", workdir, *LORA) == 0
    return workdir


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "lora"
    assert main(["export", "--lora", "--workdir", str(trained), "--out", str(out)]) == 0
    return out


def pictures(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


@pytest.mark.slow
def test_files_of_an_exported_lora(exported, tiny_pipeline):
    names = {path.name for path in exported.iterdir()}
    # PixArt's pipeline has no loader: PEFT's two files are for it, the first for others.
    assert names == {
        *("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"),
        *("scheduler", "gadjax.json", "README.md"),
    }
    size = (exported / "pytorch_lora_weights.safetensors").stat().st_size
    weights = tiny_pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    assert size < 0.3 * weights.stat().st_size
    config = json.loads((exported / "gadjax.json").read_text())
    assert config["timesteps"] == [900, 400] and config["guidance"] == 1.0
    card = (exported / "README.md").read_text()
    assert "PeftModel.from_pretrained(pipe.transformer, 'lora')" in card
    assert "gadjax sample --model tiny --lora lora --prompts" in card


@pytest.mark.slow
def test_a_lora_is_sampled_as_the_run_it_is_of(
    gadjax, trained, exported, tiny_pipeline, prompts, tmp_path
):
    """With the student's timesteps, which the file brings; at a weight of 0 it is the teacher."""
    common = "--prompts", prompts, "--out"
    gadjax("sample", "--model", trained, *common, tmp_path / "run")
    for name in ("pytorch_lora_weights.safetensors", "."):
        out = tmp_path / f"lora{name[0]}"
        gadjax("sample", "--model", tiny_pipeline, "--lora", exported / name, *common, out)
        apart = np.abs(pictures(out).astype(int) - pictures(tmp_path / "run"))
        assert apart.max() <= 1
    gadjax("sample", "--model", tiny_pipeline, "--lora", f"{exported}:0", *common, tmp_path / "0")
    assert np.abs(pictures(tmp_path / "0").astype(int) - pictures(tmp_path / "run")).max() > 1
    model, merged = load(tiny_pipeline, lora=[exported]), load(trained)
    assert model.sampling == merged.sampling


@pytest.mark.slow
def test_a_converted_folder_has_it_merged(gadjax, exported, tiny_pipeline, tmp_path):
    own, back = tmp_path / "own", tmp_path / "back"
    gadjax("convert", tiny_pipeline, own, "--lora", f"{exported}:0.5")
    gadjax("convert", own, back, "--check")
    expected = load(tiny_pipeline, lora=[f"{exported}:0.5"])
    found = read_pipeline(back).components["transformer"].params
    kernel = found["blocks"]["attn1"]["to_q"]["kernel"]
    np.testing.assert_array_equal(
        kernel, expected.params["transformer"]["blocks"]["attn1"]["to_q"]["kernel"]
    )
    assert load(back).sampling == expected.sampling
    assert load(back).fingerprint == expected.fingerprint != load(tiny_pipeline).fingerprint


def test_refusals(fails, trained, workdir, exported, tiny_pipeline, prompts, tmp_path):
    out = tmp_path / "out"
    export = ["export", "--lora", "--out", out, "--workdir"]
    fails([*export, workdir], 2, "whole weights were trained", "student.lora.rank", out=out)
    fails([*export, trained, "--keys", "x"], 2, "--keys: found 'x'; expected", out=out)
    sample = ["sample", "--model", tiny_pipeline, "--prompts", prompts, "--out", out, "--lora"]
    fails([*sample, f"{exported}:x"], 2, "--lora: found", "expected FILE or FILE:WEIGHT", out=out)
    fails([*sample, tmp_path / "none"], 2, "No such file", out=out)
    fails([*sample, prompts], 2, "expected a safetensors file", out=out)
    check = ["convert", tiny_pipeline, out, "--check", "--lora", exported]
    fails(check, 2, "--check: found it with --lora", out=out)
    fails(["export", "--verify", exported], 2, "found a LoRA", out=out)
