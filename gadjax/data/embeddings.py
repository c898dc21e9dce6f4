"""Text embeddings computed ahead of time, so that training needs no text encoder.

A folder of
  text.npy       [N + 1, L, D] float32 or float16; the last row is the empty prompt's
  mask.npy       [N + 1, L] bool, True where a token is read
  prompts.jsonl  N objects {"prompt": ...}
  manifest.json  count N, length L, width D, dtype, and the fingerprint of encoder and tokenizer
float32 keeps what the encoder said. float16 takes half the space; bfloat16 would take as much,
keep fewer digits, and is not a dtype of .npy files.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gadjax.data.prompts import read_prompts
from gadjax.errors import InputError, RunStopped

VERSION = 1
TEXT, MASK, PROMPTS, MANIFEST = "text.npy", "mask.npy", "prompts.jsonl", "manifest.json"
DTYPES = ("float32", "float16")

# text [..., L, D] of any float dtype and mask [..., L], 1 = read.
Encoded = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Embeddings:
    """An open folder: text_NLD and mask_NL are read-only memory maps, row i is prompts[i]'s.

    null: text_LD and mask_L (int32, as sources give masks) of the empty prompt, in memory.
    """

    folder: Path
    fingerprint: str
    prompts: tuple[str, ...]
    text_NLD: np.ndarray
    mask_NL: np.ndarray
    null: Encoded

    def check(self, fingerprint: str, length: int) -> None:
        """Raises: InputError unless this encoder and tokenizer wrote them, at this length."""
        for key, found, expected in (
            ("fingerprint", self.fingerprint, fingerprint),
            ("length", self.text_NLD.shape[1], length),
        ):
            if found != expected:
                raise InputError(
                    f"{self.folder / MANIFEST}: found {key} {found!r}; expected {expected!r} "
                    "(embeddings of another text encoder, tokenizer or length)"
                )


def write_embeddings(
    folder: Path,
    prompts: Sequence[str],
    batches: Iterable[Encoded],
    null: Encoded,
    *,
    fingerprint: str,
    dtype: str = "float32",
) -> None:
    """Write a folder that appears whole or not at all.

    batches: (text_BLD, mask_BL) of consecutive prompts, any B, N rows together; null: (text_LD,
    mask_L) of the empty prompt. One batch is in memory at a time.

    Raises: InputError for a folder that exists, too little space, prompts or dtype that could not
    be read back, or values that are not finite in `dtype`; RunStopped when a write fails;
    ValueError for batches that do not fit the prompts or `null`.
    """
    folder = Path(folder).resolve()
    if dtype not in DTYPES:
        raise InputError(f"dtype: found {dtype!r}; expected one of {', '.join(DTYPES)}")
    length, width = null[0].shape
    size = (len(prompts) + 1) * length * (width * np.dtype(dtype).itemsize + 1)
    building = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        if folder.exists():
            raise InputError(f"{folder}: found an existing path; expected a new folder")
        building.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{folder}: found {error.strerror}; expected a place to write to"
        ) from error
    try:
        if (free := shutil.disk_usage(building).free) < size:
            raise InputError(
                f"{folder}: found {free / 1e9:.3f} GB of free space; expected {size / 1e9:.3f} GB"
            )
        _write_prompts(building / PROMPTS, prompts)
        _write_arrays(building, prompts, batches, null, dtype)
        manifest = {
            "version": VERSION,
            "count": len(prompts),
            "length": length,
            "width": width,
            "dtype": dtype,
            "fingerprint": fingerprint,
        }
        (building / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        building.rename(folder)
    except OSError as error:
        raise RunStopped(f"{folder}: found {error.strerror or error}; nothing was kept") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_prompts(path: Path, prompts: Sequence[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in prompts)
    read_prompts(path)  # before hours of encoding, not after


def _write_arrays(
    folder: Path, prompts: Sequence[str], batches: Iterable[Encoded], null: Encoded, dtype: str
) -> None:
    count, shape = len(prompts), null[0].shape
    # Plain writes: when the disk is full they raise, while a memory map kills the process.
    with open(folder / TEXT, "wb") as text_file, open(folder / MASK, "wb") as mask_file:
        _write_header(text_file, (count + 1, *shape), dtype)
        _write_header(mask_file, (count + 1, shape[0]), "bool")
        done = 0
        for text, mask in chain(batches, [(null[0][None], null[1][None])]):
            text, mask = np.asarray(text), np.asarray(mask)
            if text.shape[1:] != shape or mask.shape != text.shape[:2]:
                raise ValueError(f"batch of {text.shape} and {mask.shape} beside a null of {shape}")
            with np.errstate(over="ignore"):
                text = text.astype(dtype)
            bad = ~np.isfinite(text).all((1, 2))
            if bad.any():
                number = done + int(bad.argmax())
                name = f"prompt {number + 1}" if number < count else "the empty prompt"
                raise InputError(f"{name}: found values not finite in {dtype}; expected finite")
            text_file.write(text.tobytes())
            mask_file.write(mask.astype(bool).tobytes())
            done += len(text)
    if done != count + 1:
        raise ValueError(f"batches of {done - 1} rows for {count} prompts")


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: str) -> None:
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def open_embeddings(folder: Path) -> Embeddings:
    """Open a folder of `write_embeddings`, reading the arrays' headers only.

    Raises: InputError naming the file that is missing, damaged, or does not fit the manifest.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    rows, length = manifest["count"] + 1, manifest["length"]
    text = _open_array(folder / TEXT, (rows, length, manifest["width"]), manifest["dtype"])
    mask = _open_array(folder / MASK, (rows, length), "bool")
    prompts = read_prompts(folder / PROMPTS)
    if len(prompts) != manifest["count"]:
        raise InputError(
            f"{folder / PROMPTS}: found {len(prompts)} prompts; "
            f"expected {manifest['count']} as in {MANIFEST}"
        )
    return Embeddings(
        folder=folder,
        fingerprint=manifest["fingerprint"],
        prompts=tuple(prompts),
        text_NLD=text[:-1],
        mask_NL=mask[:-1],
        null=(np.array(text[-1]), np.array(mask[-1], np.int32)),
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: found {error.strerror}; expected a folder written by gadjax embed"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: found broken JSON; expected a manifest") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: found no object; expected a manifest")
    positive = {key: "a positive integer" for key in ("count", "length", "width")}
    wanted = {"version": str(VERSION), **positive, "dtype": " or ".join(DTYPES)}
    for key, expected in {**wanted, "fingerprint": "text"}.items():
        value = manifest.get(key)
        if key == "version":
            valid = value == VERSION
        elif key in positive:
            valid = type(value) is int and value > 0
        elif key == "dtype":
            valid = value in DTYPES
        else:
            valid = isinstance(value, str)
        if not valid:
            raise InputError(f"{path}: found {key} {value!r}; expected {expected}")
    return manifest


def _open_array(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    expected = f"expected {dtype} {shape} as in {MANIFEST}"
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}; {expected}") from error
    except Exception as error:  # a damaged header fails in many ways
        raise InputError(f"{path}: found a truncated or corrupt file; {expected}") from error
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise InputError(f"{path}: found {array.dtype} {array.shape}; {expected}")
    if size != array.offset + array.nbytes:
        raise InputError(f"{path}: found {size} bytes; {expected}")
    return array
