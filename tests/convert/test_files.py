import json
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from gadjax.convert.atomic import atomic_folder
from gadjax.convert.files import copy_weights, fingerprint, open_weights, write_weights
from gadjax.errors import InputError

STEM = "diffusion_pytorch_model"
TORCH = {np.float32: torch.float32, np.float16: torch.float16, ml_dtypes.bfloat16: torch.bfloat16}


def numpy_tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {
        "b.weight": (5, 7),
        "a.weight": (7, 3, 2, 2),
        "b.bias": (5,),
        "scale": (),
        "ä": (0, 3),
    }
    return {k: np.array(rng.standard_normal(shape), dtype) for k, shape in shapes.items()}


def torch_tensors(tensors):
    return {
        key: torch.from_numpy(value.astype(np.float32)).to(TORCH[value.dtype.type])
        for key, value in tensors.items()
    }


def equal(ours, theirs):
    assert set(ours) == set(theirs)
    return all(
        ours[key].dtype == theirs[key].dtype
        and ours[key].shape == theirs[key].shape
        and ours[key].tobytes() == theirs[key].tobytes()
        for key in ours
    )


def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    return message


@pytest.fixture
def good(tmp_path):
    """A folder with one good file, and that file."""
    (path,) = write_weights(tmp_path / "net", STEM, numpy_tensors().items())
    return path


def rewrite_header(path, change):
    """Apply `change` to the parsed header and keep the data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


# Reading and writing


@pytest.mark.parametrize("dtype", TORCH)
def test_bytes_are_the_librarys(tmp_path, dtype):
    tensors = numpy_tensors(dtype)
    (path,) = write_weights(tmp_path, STEM, tensors.items())
    reference = tmp_path / "reference.safetensors"
    safetensors.torch.save_file(torch_tensors(tensors), reference, metadata={"format": "pt"})
    assert path.name == f"{STEM}.safetensors"
    assert path.read_bytes() == reference.read_bytes()
    assert equal(dict(open_weights(tmp_path)), tensors)


def test_mixed_dtypes_are_the_librarys(tmp_path):
    tensors = numpy_tensors()
    for i, dtype in enumerate([*TORCH, np.int64, np.int32, np.uint8, np.bool_, np.float64]):
        tensors[f"extra.{i}"] = np.arange(3).astype(dtype)
    (path,) = write_weights(tmp_path, "model", tensors.items())
    reference = {k: torch.from_numpy(v) for k, v in tensors.items() if v.dtype.name != "bfloat16"}
    reference["extra.2"] = torch.arange(3, dtype=torch.bfloat16)
    safetensors.torch.save_file(reference, tmp_path / "other", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "other").read_bytes()
    assert equal(dict(open_weights(tmp_path)), tensors)


def test_strided_views_are_laid_out(tmp_path):
    tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    write_weights(tmp_path, STEM, tensors.items())
    np.testing.assert_array_equal(dict(open_weights(tmp_path))["w"], tensors["w"])


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


# Variants


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


# Damage


@pytest.mark.parametrize("size", [0, 5, 8, 40, 0.5, -1])
def test_truncated(good, size):
    data = good.read_bytes()
    good.write_bytes(data[: int(len(data) * size) if isinstance(size, float) else size])
    refused(lambda: open_weights(good.parent), good, "truncated", "expected")


@pytest.mark.parametrize(
    "data",
    [
        np.random.default_rng(0).bytes(5000),
        struct.pack("<Q", 10) + b"\xff" * 50,
        struct.pack("<Q", 10) + b"[" * 50,
        struct.pack("<Q", 4) + b"1234",
        struct.pack("<Q", 12) + b'{"a": [1, 2]}'[:12],
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        b"<!DOCTYPE html><html>not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n",
    ],
)
def test_garbage(good, data):
    good.write_bytes(data)
    refused(lambda: open_weights(good.parent), good, "corrupt", "expected a safetensors file")


def test_bytes_left_over(good):
    good.write_bytes(good.read_bytes() + b"0")
    refused(lambda: open_weights(good.parent), good, "corrupt", "bytes; expected")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda h: h["b.bias"].update(shape=[4]), ("20 bytes for b.bias", "expected 16")),
        (lambda h: h["b.bias"].update(shape=[-5]), ("does not parse",)),
        (lambda h: h["b.bias"].update(data_offsets=[0, 20]), ("corrupt", "at byte")),
        (lambda h: h.pop("b.bias"), ("corrupt", "at byte")),
        (lambda h: h["b.bias"].update(dtype="F4"), ("b.bias of type F4", "F32")),
    ],
)
def test_header_that_lies(good, change, words):
    rewrite_header(good, change)
    refused(lambda: open_weights(good.parent), good, *words)


def test_file_cut_after_opening(good):
    weights = open_weights(good.parent)
    good.write_bytes(good.read_bytes()[:-4])
    refused(lambda: list(weights), good, "truncated")


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


# Pickles


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickle_payload_never_runs(tmp_path):
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "executed"
    torch.save({"w": Payload(trace)}, path)
    refused(lambda: open_weights(tmp_path), path, "pickle", "expected safetensors", "allow_pickle")
    refused(lambda: open_weights(tmp_path, allow_pickle=True), path, "unsafe", "UnpicklingError")
    assert not trace.exists()


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("modern", [True, False])
def test_pickle_of_tensors(tmp_path, dtype, modern):
    tensors = numpy_tensors(dtype)
    state = torch_tensors(tensors) | {"t": torch_tensors(tensors)["b.weight"].T}
    path = tmp_path / f"{STEM}.fp16.bin"
    torch.save(state, path, _use_new_zipfile_serialization=modern)
    weights = open_weights(tmp_path, allow_pickle=True)
    assert weights.variant == "fp16" and weights.dtypes["t"] == np.dtype(dtype)
    assert equal(dict(weights), tensors | {"t": np.ascontiguousarray(tensors["b.weight"].T)})


def test_pickle_of_something_else(tmp_path, monkeypatch):
    path = tmp_path / "pytorch_model.bin"
    call = lambda: open_weights(tmp_path, allow_pickle=True)  # noqa: E731
    torch.save({"state_dict": {"w": torch.ones(2)}}, path)
    refused(call, path, "expected a flat dict of named tensors")
    torch.save({"w": torch.ones(500)}, path)
    path.write_bytes(path.read_bytes()[:900])
    refused(call, path, "truncated")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(call, path, "torch is not installed", "expected safetensors")


# Fingerprints


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


# Folders that appear whole


def test_atomic_folder(tmp_path):
    dst = tmp_path / "deep" / "out"
    with atomic_folder(dst) as partial:
        (partial / "a").write_text("1")
        assert partial.parent == dst.parent and not dst.exists()
    assert [p.name for p in dst.parent.iterdir()] == ["out"]
    assert (dst / "a").read_text() == "1"
    assert dst.stat().st_mode == dst.parent.stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_folder_keeps_the_old_on_an_error(tmp_path, error):
    dst = tmp_path / "out"
    for old in ([], ["kept"]):
        for name in old:
            dst.mkdir()
            (dst / name).write_text("old")
        with pytest.raises(error), atomic_folder(dst, overwrite=True) as partial:
            (partial / "a").write_text("1")
            raise error
        assert sorted(p.name for p in tmp_path.rglob("*")) == (["kept", "out"] if old else [])


def test_atomic_folder_replaces(tmp_path):
    dst = tmp_path / "out"
    dst.mkdir()
    with atomic_folder(dst) as partial:  # empty: nothing is lost
        (partial / "a").write_text("1")
    refused(lambda: atomic_folder(dst).__enter__(), dst, "a folder with files in it")
    other = lambda: atomic_folder(dst, overwrite=True, marker="b").__enter__()  # noqa: E731
    refused(other, dst, "a folder without b")
    with atomic_folder(dst, overwrite=True, marker="a") as partial:
        (partial / "c").write_text("2")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["c", "out"]


def test_atomic_folder_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: atomic_folder(tmp_path / "file").__enter__(), "found a file")
    refused(lambda: atomic_folder(tmp_path / "file" / "out").__enter__(), "a folder to write in")
    with pytest.raises(InputError, match="with files"), atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("2")  # another process was faster
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "out", "theirs"]
