import json
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import STEM, TORCH, equal, numpy_tensors, refused, torch_tensors

from gadjax.formats.weights import open_weights, write_weights


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


def rewrite_header(path, change):
    """Apply `change` to the parsed header and keep the data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


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
    ],
)
def test_garbage(good, data):
    good.write_bytes(data)
    refused(lambda: open_weights(good.parent), good, "corrupt", "expected a safetensors file")


def test_a_git_lfs_pointer(good):
    good.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")
    refused(lambda: open_weights(good.parent), good, "git-lfs", "expected a safetensors file")


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
def test_inconsistent_header(good, change, words):
    rewrite_header(good, change)
    refused(lambda: open_weights(good.parent), good, *words)


def test_file_cut_after_opening(good):
    weights = open_weights(good.parent)
    good.write_bytes(good.read_bytes()[:-4])
    refused(lambda: list(weights), good, "truncated")
