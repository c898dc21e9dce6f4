"""gadjax lora: info, extract and merge."""

import json
import re

import numpy as np
import pytest
from checkpoints import state
from safetensors.numpy import load_file, save_file
from train_runs import train

from gadjax import load, sample
from gadjax.cli.main import main
from gadjax.formats.fingerprints import text_fingerprint
from gadjax.formats.lora_extract import Difference, LayerError
from gadjax.formats.lora_writer import Pair
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.sampling_config import GADJAX_JSON, SamplingConfig
from gadjax.pipelines.extract_lora import Extract, lora_export
from gadjax.pipelines.pipeline import make_pipeline

LORA = (
    *("--config.student.lora.rank=4", "--config.student.lora.alpha=32.0"),
    *("--config.optim.lr=0.03", "--config.steps=2"),
)


@pytest.fixture(scope="module")
def student(config, tmp_path_factory):
    """A LoRA student as a file and as a merged pipeline folder."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("lora")
    assert train(f"{config}:regression", folder / "run", *LORA) == 0
    export = "export", "--workdir", str(folder / "run"), "--out"
    assert main([*export, str(folder / "lora"), "--lora"]) == 0
    assert main([*export, str(folder / "merged")]) == 0
    return folder


@pytest.fixture(scope="module")
def extracted(student, tiny_pipeline):
    out = student / "extracted"
    arguments = [str(tiny_pipeline), str(student / "merged"), "--rank", "4", "--out", str(out)]
    assert main(["lora", "extract", *arguments]) == 0
    return out


def test_info(student, capsys):
    assert main(["lora", "info", str(student / "lora")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("pytorch_lora_weights.safetensors: LoRA")
    assert "keys: diffusers: 20" in lines and "networks: PixArt or SANA: 20" in lines
    assert "ranks: 4: 20" in lines and "scales: 1: 20" in lines
    assert "tensors: 40, " in lines[1] and "(float32: 40)" in lines[1]
    (hint,) = (line for line in lines if "usage_hint" in line)
    assert "2 steps from timesteps 900, 400" in hint
    assert any("modelspec.title: 'lora'" in line for line in lines)


def test_extract_gives_the_student_back(student, extracted, tiny_pipeline, capsys):
    """At the rank of its adapters the difference is all of it, and diffusers draws it alike."""
    metadata = json.loads((extracted / GADJAX_JSON).read_text())
    assert metadata["verified"]["max_difference"] <= 1e-4
    errors = json.loads((extracted / "errors.json").read_text())
    assert errors["rank"] == 4 and len(errors["layers"]) == 20 and errors["error"] < 1e-4
    ours, theirs = load(tiny_pipeline, lora=[extracted]), load(student / "merged")
    assert ours.sampling.timesteps == (900, 400)
    pictures = [sample(model, "red circle", 3).astype(int) for model in (ours, theirs)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    card = (extracted / "README.md").read_text()
    assert "Rank 4 of the difference of two networks" in card


@pytest.mark.slow
def test_extract_says_what_a_rank_leaves_out(student, tiny_pipeline, tmp_path, capsys):
    flags = "--energy", "0.9", "--prompt", "red circle", "--keys", "kohya", "--dtype", "bfloat16"
    arguments = str(tiny_pipeline), str(student / "merged"), "--out", str(tmp_path / "out")
    assert main(["lora", "extract", *arguments, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    rank = json.loads((tmp_path / "out" / "errors.json").read_text())["rank"]
    assert lines[0].startswith(f"rank {rank}, 20 layers: leaves out ") and rank < 4
    (line,) = (line for line in lines if line.startswith("pictures of 'red circle':"))
    with_lora, without = map(float, re.findall(r"\d\.\d{4}", line))
    assert 0 < with_lora < without
    keys = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("lora_unet_transformer_blocks_") for key in keys)
    assert {str(x.dtype) for x in keys.values()} == {"bfloat16"}


def test_merge_writes_the_merged_folder(student, tiny_pipeline, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(["lora", "merge", str(tiny_pipeline), str(student / "lora"), "--out", str(out)]) == 0
    )
    assert capsys.readouterr().out.endswith("with lora (1)\n")
    ours, theirs = state(out, "transformer"), state(student / "merged", "transformer")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key].numpy(), value.numpy(), rtol=0, atol=1e-6)
    assert load(out).sampling == load(student / "merged").sampling
    assert text_fingerprint(out) == text_fingerprint(tiny_pipeline)
    # Once more and back: the weights are those of the start.
    back = [str(out), f"{student / 'lora'}:-1", "--out", str(tmp_path / "back"), "--dtype=float32"]
    assert main(["lora", "merge", *back]) == 0
    plain = state(tiny_pipeline, "transformer")
    for key, value in state(tmp_path / "back", "transformer").items():
        np.testing.assert_allclose(value.numpy(), plain[key].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--rank", "0"], "--rank: found 0; expected 1 or more"),
        (["--energy", "1.5"], "--energy: found 1.5; expected a share above 0, up to 1"),
        (["--energy", "nan"], "--energy: found nan; expected a share"),
        (["--energy", ".5", "--rank", "3"], "not allowed with argument"),
        (["--keys", "x"], "--keys: found 'x'"),
    ],
)
def test_extract_refuses(flags, message, tiny_pipeline, tmp_path, capsys):
    arguments = str(tiny_pipeline), str(tiny_pipeline), "--out", str(tmp_path / "out")
    assert main(["lora", "extract", *arguments, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["flux_dev", "z_image"])
def test_an_extract_of_a_few_step_student_is_called_as_its_pipeline(family, folders):
    """With the size of its latents, and FLUX's scale as the network's input; its times are those of
    the pipeline's own grid."""
    folder, scale = open_folder(folders(family)), 3.5 if family == "flux_dev" else 1.0
    pipeline, sampling = make_pipeline(folder), SamplingConfig(4, None, scale, 12)
    pair, error = Pair(np.ones((1, 2)), np.ones((2, 1))), LayerError("a", 1.0, 0.5, 0.0)
    difference = Difference({"a": pair}, [error], {})
    made = lora_export(Extract(folder, folder, difference, sampling), "x")
    height, width, channels = pipeline.latent
    assert made.description.latent == (height, width, channels)
    arguments = made.description.arguments
    assert arguments["height"] == height * pipeline.upscale
    assert "true_cfg_scale" not in arguments
    assert arguments["guidance_scale"] == (3.5 if family == "flux_dev" else 0)
    times = pipeline.sampler.times(4)[:-1]
    np.testing.assert_allclose(made.sampling.timesteps, times, rtol=1e-6)
    assert made.scheduler["shift"] == 1 and made.sampling.guidance == scale


def test_other_networks_have_no_difference(tiny_pipeline, folders, tmp_path, capsys):
    out = "--out", str(tmp_path / "out")
    assert main(["lora", "extract", str(tiny_pipeline), str(folders("sana")), *out]) == 2
    assert "of another configuration than in" in capsys.readouterr().err
    assert main(["lora", "extract", str(tiny_pipeline), str(tiny_pipeline), *out]) == 2
    assert "found no kernel unlike that in" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


NAMES = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (
        "kohya, modules of diffusers",
        "U-Net of SDXL",
    ),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (
        "kohya, original modules",
        "U-Net of SDXL",
    ),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": ("kohya, modules of diffusers", "text encoder"),
    "transformer.transformer_blocks.0.attn.add_q_proj": ("diffusers", "Stable Diffusion 3"),
    "diffusion_model.double_blocks.0.img_attn.qkv": ("ComfyUI", "FLUX"),
    "base_model.model.transformer_blocks.0.attn1.to_q": ("PEFT", "PixArt or SANA"),
    "diffusion_model.layers.0.attention.to_q": ("ComfyUI", "Z-Image"),
    "transformer.layers.0.attn.to_q": ("diffusers", "Lumina 2"),
    "transformer.noise_refiner.1.feed_forward.linear_1": ("diffusers", "Lumina 2"),
    "transformer.transformer_blocks.0.img_mlp.net.2": ("diffusers", "Qwen-Image (not supported)"),
}


@pytest.mark.parametrize("stem", NAMES)
def test_info_of_other_files(stem, tmp_path, capsys):
    form, network = NAMES[stem]
    tensors = {
        f"{stem}.lora_down.weight": np.zeros((8, 2048), np.float16),
        f"{stem}.lora_up.weight": np.zeros((4, 8), np.float16),
        f"{stem}.alpha": np.array(2.0, np.float32),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert main(["lora", "info", str(tmp_path / "a.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert f"keys: {form}: 1" in printed and f"networks: {network}: 1" in printed
    assert "scales: 0.25 (alpha 2): 1" in printed


def test_info_names_other_kinds(tmp_path, capsys):
    save_file({"lora_unet_x.lokr_w1": np.zeros(3)}, tmp_path / "a.safetensors")
    assert main(["lora", "info", str(tmp_path / "a.safetensors")]) == 0
    assert ": LoKr\n" in capsys.readouterr().out
    save_file({"x": np.zeros(3)}, tmp_path / "b.safetensors")
    assert main(["lora", "info", str(tmp_path / "b.safetensors")]) == 2
    assert "found 1 tensors of no adapter" in capsys.readouterr().err
