"""gadjax convert: the round trip is bit-exact, and outputs equal those of diffusers."""

import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from checkpoints import edit, same, state

from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.pipelines import parity

NETWORKS = ("transformer", "text_encoder", "vae")


def small_files(folder):
    """Contents of all files but weights and manifests, by path in the folder."""
    suffixes = (".safetensors", "gadjax_folder.json")
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    kept = [p for p in paths if p.parts[0] != "params" and not p.name.endswith(suffixes)]
    return {path: (folder / path).read_bytes() for path in kept}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_exact(dtype, tiny_pipeline, tmp_path, gadjax):
    src, converted, back = tmp_path / "src", tmp_path / "own", tmp_path / "back"
    shutil.copytree(tiny_pipeline, src)
    for path in src.rglob("*.safetensors"):
        tensors = {k: v.to(dtype) for k, v in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    (src / "README.md").write_text("a card")
    (src / "gadjax.json").write_text('{"steps": 7}')
    gadjax("convert", src, converted)
    gadjax("convert", converted, back)
    for name in NETWORKS:
        assert same(state(back, name), state(src, name))
    assert small_files(converted) == small_files(back) == small_files(src)
    assert not list(converted.rglob("*.safetensors"))
    networks = json.loads((converted / "gadjax_folder.json").read_text())["networks"]
    assert {name: entry["dtype"] for name, entry in networks.items()} == dict.fromkeys(
        NETWORKS, str(dtype).removeprefix("torch.")
    )


def test_check_compares_every_network(tiny_pipeline, tmp_path, gadjax):
    converted, back = tmp_path / "own", tmp_path / "back"
    for output in (
        gadjax("convert", tiny_pipeline, converted, "--check", "--dtype", "bfloat16"),
        gadjax("convert", converted, back, "--check"),
    ):
        errors = dict(
            line.split(": largest relative difference") for line in output.splitlines()[:-1]
        )
        assert sorted(errors) == ["text_encoder", "transformer", "vae decode", "vae encode"]
        assert all(float(error.split()[-1]) < 1e-5 for error in errors.values())
    expected = {k: v.to(torch.bfloat16) for k, v in state(tiny_pipeline, "vae").items()}
    assert same(state(back, "vae"), expected)


def test_nothing_is_written_if_outputs_differ_from_diffusers(
    tiny_pipeline, tmp_path, fails, monkeypatch
):
    monkeypatch.setattr(parity, "NETWORK_BOUND", 0.0)
    out = tmp_path / "own"
    fails(["convert", tiny_pipeline, out, "--check"], 3, "relative difference", out=out)


def test_check_detects_a_changed_weight(tiny_pipeline, tmp_path):
    other = shutil.copytree(tiny_pipeline, tmp_path / "other")
    path = other / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["proj_out.bias"][0] += 0.1
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    ours, theirs = read_pipeline(tiny_pipeline), read_pipeline(other)
    errors = parity.compare_networks(ours, theirs)
    assert errors.pop("transformer") > 1e-3
    assert max(errors.values()) < 1e-5


def test_check_without_torch(tiny_pipeline, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(parity, "missing", lambda: ["torch"])
    out = tmp_path / "own"
    fails(["convert", tiny_pipeline, out, "--check"], 2, "--check: found no torch", out=out)


def test_bad_input(tiny_pipeline, workdir, tmp_path, fails):
    out = tmp_path / "out"
    for arguments, word in (
        ([tmp_path / "absent"], "no such folder"),
        ([workdir], "gadjax export"),
        ([tiny_pipeline, "--dtype", "int8"], "--dtype: found 'int8'"),
        ([tiny_pipeline, "--variant", "fp8"], "fp8"),
        ([tiny_pipeline, "--colour"], "--colour"),
    ):
        fails(["convert", arguments[0], out, *arguments[1:]], 2, word, out=out)
    fails(["convert", tiny_pipeline], 2, "DST", out=out)
    fails(["convert", tiny_pipeline, tiny_pipeline, "--overwrite"], 2, tiny_pipeline, out=out)


def test_overwrite_replaces_only_the_same_kind(tiny_pipeline, tmp_path, gadjax, fails):
    converted, photos = tmp_path / "own", tmp_path / "photos"
    for folder in (converted, photos):
        folder.mkdir()
        (folder / "a.jpg").write_text("mine")
    fails(["convert", tiny_pipeline, converted], 2, "files in it", out=converted)
    fails(["convert", tiny_pipeline, photos, "--overwrite"], 2, "gadjax_folder.json", out=photos)
    (converted / "gadjax_folder.json").write_text("{}")
    gadjax("convert", tiny_pipeline, converted, "--overwrite")
    assert (converted / "params" / "vae").is_dir() and not (converted / "a.jpg").exists()


def test_damage_is_named(tiny_pipeline, tmp_path, gadjax, fails):
    converted, out = tmp_path / "own", tmp_path / "out"
    gadjax("convert", tiny_pipeline, converted)

    def damaged(name):
        return shutil.copytree(converted, tmp_path / name)

    flipped = damaged("flipped")
    data = [path for path in (flipped / "params" / "vae").rglob("d/*") if path.is_file()]
    largest = max(data, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    fails(["convert", flipped, out], 2, flipped / "params" / "vae", largest.name, "CRC-32", out=out)

    short = damaged("short") / "params" / "vae" / "manifest.ocdbt"
    os.truncate(short, 1)
    fails(["convert", short.parents[2], out], 2, short.parent, short.name, "1 bytes", out=out)

    lacking = damaged("lacking")
    shutil.rmtree(lacking / "params" / "transformer")
    fails(["convert", lacking, out], 2, lacking / "params" / "transformer", "missing", out=out)

    blank = damaged("blank")
    shutil.rmtree(blank / "tokenizer")
    fails(["convert", blank, out], 2, blank / "tokenizer", "no such folder", out=out)

    newer = damaged("newer")
    edit(newer / "gadjax_folder.json", version=2)
    fails(["convert", newer, out], 2, "found version 2; expected 1", out=out)

    other = damaged("other")
    edit(other / "transformer" / "config.json", num_layers=3)
    fails(["convert", other, out], 2, other / "params" / "transformer", "expected (3, ", out=out)

    broken = damaged("broken")
    edit(broken / "vae" / "config.json", block_out_channels="wide")
    fails(["convert", broken, out], 2, broken / "vae" / "config.json", out=out)
