"""Read weights in torch's pickle format (opt-in) with torch's weights-only reader.

No code in the file is executed. Needs torch.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gadjax.errors import InputError
from gadjax.io.untrusted import open_file


@dataclass(frozen=True)
class PickledTensor:
    """One tensor of a .bin file; memory-mapped where torch can."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Any

    def read(self) -> np.ndarray:
        import torch

        value = self.value.detach().contiguous()
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()


def read_pickle(path: Path) -> dict[str, PickledTensor]:
    """Read the tensors of a .bin file with torch's weights-only reader.

    Raises: InputError if torch is absent, or the file is damaged, holds anything but a flat dict
      of tensors, or would run code.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path}: found a pickle, which only torch reads and torch is not installed; "
            "expected safetensors"
        ) from None
    with open_file(path, "a dict of tensors"):  # neither a pipe nor a device
        pass
    try:
        mapped = zipfile.is_zipfile(path)  # torch's older format cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file can fail anywhere in torch's reader
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: truncated, corrupt or unsafe: found {type(error).__name__} ({reason}); "
            "expected a dict of tensors"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and _is_plain(value) for key, value in tensors.items()
    ):
        raise InputError(f"{path}: found something else; expected a flat dict of named tensors")
    return {
        key: PickledTensor(path, tuple(value.shape), _dtype(path, key, value), value)
        for key, value in tensors.items()
    }


def _is_plain(value: Any) -> bool:
    """True for a dense tensor in CPU memory: not sparse, not quantized, not on the meta device."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _dtype(path: Path, key: str, value) -> np.dtype:
    name = str(value.dtype).removeprefix("torch.")
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise InputError(f"{path}: found {key} of type {name}; expected a plain type") from None
