"""Tensors, pipelines and checks that the tests of checkpoints share."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

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


def edit(path, **changes):
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def state(path, name):
    """A component's tensors by the safetensors library, from all its files."""
    paths = sorted((path / name).glob("*.safetensors"))
    return {k: v for p in paths for k, v in safetensors.torch.load_file(p).items()}


def same(ours, theirs):
    return set(ours) == set(theirs) and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key])
        for key in theirs
    )


def params_of(pipeline):
    return {name: part.params for name, part in pipeline.components.items()}


def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    return message
