import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import STEM, TORCH, numpy_tensors, refused, torch_tensors

from gadjax.formats.weights import copy_weights, fingerprint, open_weights, write_weights


def test_shards_are_those_of_diffusers(tmp_path, torch_pipeline):
    torch_pipeline.vae.save_pretrained(tmp_path / "theirs", max_shard_size=20_000, variant="fp16")
    theirs = open_weights(tmp_path / "theirs", "fp16")
    state = {key: value.numpy() for key, value in torch_pipeline.vae.state_dict().items()}
    written = write_weights(
        tmp_path / "ours", STEM, state.items(), max_shard_bytes=20_000, variant="fp16"
    )
    assert len(written) > 3 and [p.name for p in written] == [p.name for p in theirs.files]
    index, *shards = [(ours, path) for ours, path in zip(written, theirs.files, strict=True)]
    for ours, path in shards:
        assert ours.read_bytes() == path.read_bytes()
    ours, path = (json.loads(p.read_text()) for p in index)
    assert ours["weight_map"] == path["weight_map"]
    assert ours["metadata"]["total_size"] == path["metadata"]["total_size"]


def test_stream_of_some_keys(good):
    weights = open_weights(good.parent)
    assert [key for key, _ in weights.stream({"b.bias"})] == ["b.bias"]
    assert weights.shapes["a.weight"] == (7, 3, 2, 2) and weights.dtypes["b.bias"] == np.float32


def test_casting(tmp_path):
    tensors = numpy_tensors() | {"ids": np.arange(3)}
    write_weights(tmp_path, STEM, tensors.items(), dtype=ml_dtypes.bfloat16)
    read = dict(open_weights(tmp_path))
    assert read["ids"].dtype == np.int64
    assert read["b.weight"].tobytes() == tensors["b.weight"].astype(ml_dtypes.bfloat16).tobytes()


def test_writing_refuses_what_is_not_finite(tmp_path):
    tensors = numpy_tensors()
    tensors["b.weight"][2, 3] = 1e5
    write_weights(tmp_path / "net", STEM, tensors.items())
    call = lambda: write_weights(tmp_path / "net", STEM, tensors.items(), dtype=np.float16)  # noqa: E731
    refused(call, "net/", "b.weight", "not finite in float16")


def touch(folder, *names):
    for name in names:
        safetensors.torch.save_file({name: torch.ones(2)}, folder / name)


def held(folder, variant=None):
    weights = open_weights(folder, variant)
    return weights.variant, list(weights.entries)


def test_plain_file_goes_first(tmp_path):
    touch(tmp_path, "model.safetensors", "model.fp16.safetensors", "model.non_ema.safetensors")
    assert held(tmp_path) == (None, ["model.safetensors"])
    assert held(tmp_path, "fp16") == ("fp16", ["model.fp16.safetensors"])
    refused(lambda: open_weights(tmp_path, "bf16"), tmp_path, "no variant bf16", "fp16 or non_ema")


def test_only_variant_is_taken(tmp_path):
    touch(tmp_path, "model.fp16.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert held(tmp_path) == ("fp16", ["model.fp16.safetensors"])
    touch(tmp_path, "model.bf16.safetensors")
    (tmp_path / "pytorch_model.bin").unlink()
    refused(lambda: open_weights(tmp_path), tmp_path, "variants bf16, fp16", "expected one")


@pytest.mark.parametrize(
    "shard, index",
    [
        ("{}-{}.safetensors", "{}.safetensors.index.json"),
        ("{}.fp16-{}.safetensors", "{}.safetensors.index.fp16.json"),
        ("{}-{}.fp16.safetensors", "{}.safetensors.index.fp16.json"),
        ("{}-{}.fp16.safetensors", "{}.fp16.safetensors.index.json"),
        ("{}-{}.fp16.safetensors", "{}.safetensors.fp16.index.json"),
    ],
)
def test_spellings_of_shards(tmp_path, shard, index):
    names = [shard.format(STEM, f"0000{i}-of-00002") for i in (1, 2)]
    touch(tmp_path, *names)
    path = tmp_path / index.format(STEM)
    path.write_text(json.dumps({"metadata": {}, "weight_map": {name: name for name in names}}))
    variant = "fp16" if "fp16" in index else None
    weights = open_weights(tmp_path)
    assert weights.variant == variant and set(weights.entries) == set(names)
    assert weights.files == (path, *(tmp_path / name for name in names))

    copy_weights(weights, tmp_path / "copy")
    plain = open_weights(tmp_path / "copy")
    assert plain.variant is None and fingerprint(plain) == fingerprint(weights)
    assert not list((tmp_path / "copy").glob("*fp16*"))


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_not_finite(tmp_path, dtype, bad):
    tensors = numpy_tensors(dtype)
    tensors["a.weight"][3, 2, 1, 0] = bad
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(torch_tensors(tensors), path)
    weights = open_weights(tmp_path)
    refused(lambda: list(weights), path, "NaN or infinity in a.weight")
    refused(lambda: fingerprint(weights), path, "a.weight")


def test_missing_folder_and_files(tmp_path):
    refused(lambda: open_weights(tmp_path / "no"), tmp_path / "no", "no such folder")
    refused(lambda: open_weights(tmp_path), tmp_path, "no weights, only nothing", STEM)
    touch(tmp_path, "model-00001-of-00002.safetensors")
    refused(lambda: open_weights(tmp_path), "only model-00001-of-00002.safetensors", "index")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    refused(lambda: open_weights(tmp_path), "model.safetensors", "No such file")


@pytest.fixture
def sharded(tmp_path):
    return write_weights(tmp_path, STEM, numpy_tensors().items(), max_shard_bytes=150)


def test_missing_shard(sharded, tmp_path):
    index, first, *_ = sharded
    first.unlink()
    refused(lambda: open_weights(tmp_path), index, f"no shard {first.name}", "beside the index")


def test_index_and_shard_disagree(sharded, tmp_path):
    index, first, *_ = sharded
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = first.name
    index.write_text(json.dumps(content))
    refused(lambda: open_weights(tmp_path), first, "no ghost", index.name)
    del content["weight_map"]["ghost"], content["weight_map"]["b.weight"]
    content["weight_map"]["scale"] = content["weight_map"]["a.weight"]
    index.write_text(json.dumps(content))
    refused(lambda: open_weights(tmp_path), "expected the tensors named by", index.name)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b"}}']
)
def test_bad_index(sharded, tmp_path, text):
    sharded[0].write_text(text)
    refused(lambda: open_weights(tmp_path), sharded[0], "expected")


def test_fingerprint(tmp_path):
    tensors = numpy_tensors()
    names = {"whole": {}, "split": {"max_shard_bytes": 150}, "fp16": {"variant": "fp16"}}
    prints = set()
    for name, options in names.items():
        write_weights(tmp_path / name, STEM, tensors.items(), **options)
        prints.add(fingerprint(open_weights(tmp_path / name)))
    prints.add(fingerprint(reversed(tensors.items())))
    assert len(prints) == 1 and len(prints.pop()) == 32

    base = fingerprint(tensors.items())
    flipped = {key: value.copy() for key, value in tensors.items()}
    flipped["b.bias"].view(np.uint32)[3] ^= 1
    reshaped = tensors | {"b.weight": tensors["b.weight"].reshape(7, 5)}
    renamed = {key.replace("scale", "scales"): value for key, value in tensors.items()}
    swapped = tensors | {"x": tensors["scale"], "scale": tensors["scale"] + 1}
    others = [fingerprint(t.items()) for t in (flipped, reshaped, renamed, swapped)]
    assert len({base, *others}) == 5
