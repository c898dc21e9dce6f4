import sys

import numpy as np
import pytest
import torch
from checkpoints import STEM, TORCH, equal, numpy_tensors, refused, torch_tensors

from gadjax.formats.weights import open_weights


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


def test_pickle_without_tensors(tmp_path, monkeypatch):
    path = tmp_path / "pytorch_model.bin"
    call = lambda: open_weights(tmp_path, allow_pickle=True)  # noqa: E731
    torch.save({"state_dict": {"w": torch.ones(2)}}, path)
    refused(call, path, "expected a flat dict of named tensors")
    torch.save({"w": torch.ones(500)}, path)
    path.write_bytes(path.read_bytes()[:900])
    refused(call, path, "truncated")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(call, path, "torch is not installed", "expected safetensors")
