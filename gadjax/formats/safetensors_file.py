"""Read and write safetensors files: a JSON header of names, dtypes and offsets, then the data.

Own code in place of the library: headers are validated without touching the data, bfloat16 is
read as bfloat16, and writing keeps one tensor in memory. Files are byte-identical to the
library's. Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gadjax.errors import InputError
from gadjax.formats.state_dict import all_finite, fill
from gadjax.io.untrusted import open_file, parse_json

# In the library's order: a file holds its tensors from the last dtype to the first, by name.
TYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
RANKS = {dtype: rank for rank, dtype in enumerate(TYPES.values())}
NAMES = {dtype: name for name, dtype in TYPES.items()}
MAX_HEADER = 100_000_000  # bytes, the library's limit
MAX_AXES, MAX_SIZE = 32, 1 << 48


@dataclass(frozen=True)
class Tensor:
    """Header entry of one tensor of a safetensors file. offset: its first byte in the file."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Read the tensor into new memory. Raises: InputError if the file has been truncated."""
        data = np.fromfile(self.path, np.uint8, self.nbytes, offset=self.offset)
        if data.size != self.nbytes:
            raise InputError(f"{self.path}: truncated while it was read; expected it unchanged")
        return data.view(self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """Read a safetensors header: its tensors in the order of their data, which is not read.

    Raises: InputError for a truncated file, another format, or a header that does not account for
      every byte of the file.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of `read_header`, and the texts of the header's metadata by their names."""
    with open_file(path, "a safetensors file") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        raw = b"" if length > min(MAX_HEADER, size - 8) else file.read(length)
    if not raw:
        raise InputError(
            f"{path}: truncated or corrupt: found {size} bytes with a header of {length}; "
            "expected a safetensors file"
        )
    try:
        header = parse_json(raw)
        metadata = header.pop("__metadata__", None) or {}
        metadata = {name: text for name, text in metadata.items() if isinstance(text, str)}
        tensors = {key: _tensor(path, key, entry, 8 + length) for key, entry in header.items()}
    except InputError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError):
        raise InputError(
            f"{path}: truncated or corrupt: found a header that does not parse; "
            "expected a safetensors file"
        ) from None
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = 8 + length
    for key, tensor in tensors.items():
        if tensor.offset != end:
            raise InputError(
                f"{path}: corrupt: found {key} at byte {tensor.offset}; expected it at {end}"
            )
        end += tensor.nbytes
    if end != size:
        kind = "truncated" if size < end else "corrupt"
        raise InputError(f"{path}: {kind}: found {size} bytes; expected {end} from its header")
    return tensors, metadata


def _tensor(path: Path, key: str, entry: Mapping[str, Any], data: int) -> Tensor:
    if entry["dtype"] not in TYPES:
        raise InputError(
            f"{path}: found {key} of type {entry['dtype']}; expected one of {', '.join(TYPES)}"
        )
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(key)
    # Numpy's limits, which hold even if another axis is 0.
    if len(shape) > MAX_AXES or math.prod(n or 1 for n in shape) > MAX_SIZE:
        raise ValueError(key)
    tensor = Tensor(path, shape, TYPES[entry["dtype"]], data + begin)
    if tensor.nbytes != end - begin:
        raise InputError(
            f"{path}: corrupt: found {end - begin} bytes for {key}; expected {tensor.nbytes} "
            f"for {tensor.dtype} {shape}"
        )
    return tensor


def target_dtype(value: np.ndarray, dtype) -> np.dtype:
    """Dtype of a tensor in the file: `dtype` for floating tensors, its own otherwise or if None."""
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return np.dtype(dtype) if dtype is not None and floating else value.dtype


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    dtype=None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file; strided arrays are made contiguous one at a time.

    Args:
      path: the file.
      tensors: arrays by key.
      dtype: dtype that floating tensors are cast to; None keeps theirs.
      metadata: further texts of the header, by name.

    Raises: InputError naming a tensor with non-finite values, before or after the cast.
    """
    dtypes = {key: target_dtype(value, dtype) for key, value in tensors.items()}
    order = sorted(tensors, key=lambda key: (-RANKS[dtypes[key]], key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    end = 0
    for key in order:
        begin, end = end, end + tensors[key].size * dtypes[key].itemsize
        header[key] = {
            "dtype": NAMES[dtypes[key]],
            "shape": list(tensors[key].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            value = np.asarray(tensors[key])
            if not value.flags.c_contiguous or value.dtype != dtypes[key]:
                value = np.empty(value.shape, dtypes[key])
                with np.errstate(over="ignore"):
                    fill(value, tensors[key])
            if not all_finite(value):
                raise InputError(
                    f"{path.parent.name}/{path.name}: found values of {key} that are not finite "
                    f"in {value.dtype}; expected finite ones"
                )
            file.write(value.reshape(-1).view(np.uint8))
