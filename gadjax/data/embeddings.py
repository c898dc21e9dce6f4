"""Folders of precomputed prompt embeddings and latents, so that training needs no text encoder.

Latents are those of the images that the prompts are captions of. Files:
  text.npy       prompt embeddings [N + 1, L, D], float32 or float16; the last row is the empty
                 prompt's, as the family's default negative prompt
  mask.npy       attention mask [N + 1, L] bool, True = attend
  pooled.npy     pooled embeddings [N + 1, P] in text.npy's dtype, if the family has them
  latents.npy    [N, H, W, C] in text.npy's dtype, if the prompts are captions of images
  prompts.jsonl  N objects {"prompt": ...}
  manifest.json  count N, length L, width D, dtype, and the fingerprint of encoders and tokenizers;
                 with pooled.npy its width, pooled; with latents their shape (H, W, C) and vae, the
                 fingerprint of the autoencoder
float32 keeps the encoder's output exactly. float16 takes half the space; bfloat16 would take as
much, keep fewer digits, and is not a dtype of .npy files.
"""

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gadjax.data.prompts import read_prompts
from gadjax.errors import InputError, check_choice, short_repr
from gadjax.io.untrusted import is_count, is_text, open_file, read_json

VERSION = 1
TEXT, MASK, POOLED, LATENTS = "text.npy", "mask.npy", "pooled.npy", "latents.npy"
PROMPTS, MANIFEST = "prompts.jsonl", "manifest.json"
DTYPES = ("float32", "float16")

# Encoded prompts: "text" [..., L, D] of any float dtype, "mask" [..., L] (1 = attend), "pooled"
# [..., P] if the family has it; with images their latents "x0" [..., H, W, C].
Encoded = dict[str, np.ndarray]


@dataclass(frozen=True)
class Origin:
    """Origin of a folder of embeddings, as fingerprints.

    text: of text encoder and tokenizer. vae: of the autoencoder, and latent: shape (H, W, C) of a
    latent; both None without images.
    """

    text: str
    vae: str | None = None
    latent: tuple[int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Prompt embeddings of an open folder, as read-only memory maps; row i belongs to prompts[i].

    pooled_NP is None if the family has no pooled embedding, latent_NHWC without images.

    null: embeddings of the empty prompt, as `texts` but without a batch axis, in memory.
    """

    folder: Path
    origin: Origin
    prompts: tuple[str, ...]
    text_NLD: np.ndarray
    mask_NL: np.ndarray
    pooled_NP: np.ndarray | None
    latent_NHWC: np.ndarray | None
    null: Encoded

    def texts(self, indices: np.ndarray) -> Encoded:
        """Encoded prompts of these indices [B]; masks as the sources give them, int32."""
        encoded = {"text": self.text_NLD[indices], "mask": self.mask_NL[indices].astype(np.int32)}
        return encoded if self.pooled_NP is None else encoded | {"pooled": self.pooled_NP[indices]}

    def check(self, fingerprint: str, length: int) -> None:
        """Check the fingerprint of encoder and tokenizer, and the length. Raises: InputError."""
        reason = "embeddings of another text encoder, tokenizer or length"
        self._same("fingerprint", self.origin.text, fingerprint, reason)
        self._same("length", self.text_NLD.shape[1], length, reason)

    def check_latents(self, fingerprint: str, shape: tuple[int, int, int]) -> None:
        """Check that there are latents of this autoencoder and shape. Raises: InputError."""
        if self.latent_NHWC is None:
            raise InputError(
                f"{self.folder / MANIFEST}: found no latents; expected those of images "
                "(gadjax embed --images)"
            )
        reason = "latents of another autoencoder or size"
        self._same("vae", self.origin.vae, fingerprint, reason)
        self._same("latent", self.origin.latent, shape, reason)

    def _same(self, key: str, actual: Any, expected: Any, reason: str) -> None:
        if actual != expected:
            raise InputError(
                f"{self.folder / MANIFEST}: found {key} {short_repr(actual)}; expected "
                f"{expected!r} ({reason})"
            )


def write_embeddings(
    folder: Path,
    prompts: Sequence[str],
    batches: Iterable[Encoded],
    null: Encoded,
    *,
    origin: Origin,
    dtype: str = "float32",
) -> None:
    """Write prompt embeddings, one batch in memory at a time.

    Args:
        folder: an empty folder.
        prompts: N prompts.
        batches: encoded prompts in their order, N rows in batches of any size, with x0_BHWC if
            `origin` has latents.
        null: the encoded empty prompt, without a batch axis.
        origin: fingerprints for the manifest.
        dtype: dtype of the files, float32 or float16.

    Raises:
        InputError: too little space, prompts or a dtype that could not be read back, or values
            that are not finite in `dtype`.
        OSError: a write fails.
        ValueError: batches do not match the prompts or `null`.
    """
    check_choice("dtype", dtype, DTYPES)
    length, width = null["text"].shape
    item, pooled = np.dtype(dtype).itemsize, len(null.get("pooled", ()))
    size = (len(prompts) + 1) * (length * (width * item + 1) + pooled * item)
    size += len(prompts) * math.prod(origin.latent or (0,)) * item
    if (free := shutil.disk_usage(folder).free) < size:
        space = f"found {free / 1e9:.3f} GB of free space"
        raise InputError(f"{folder.parent}: {space}; expected {size / 1e9:.3f} GB")
    _write_prompts(folder / PROMPTS, prompts)
    _write_arrays(folder, len(prompts), batches, null, origin.latent, dtype)
    manifest = {
        "version": VERSION,
        "count": len(prompts),
        "length": length,
        "width": width,
        "dtype": dtype,
        "fingerprint": origin.text,
    }
    if pooled:
        manifest["pooled"] = pooled
    if origin.latent:
        manifest |= {"vae": origin.vae, "latent": origin.latent}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _write_prompts(path: Path, prompts: Sequence[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in prompts)
    read_prompts(path)  # refuses them before hours of encoding, not after


def _write_arrays(
    folder: Path,
    count: int,
    batches: Iterable[Encoded],
    null: Encoded,
    latent: tuple[int, ...] | None,
    dtype: str,
) -> None:
    files = {"text": TEXT, "mask": MASK, "pooled": POOLED}
    rows = {name: null[name].shape for name in files if name in null}
    shapes = {files[name]: (count + 1, *shape) for name, shape in rows.items()}
    if latent:
        rows["x0"], shapes[LATENTS] = latent, (count, *latent)
    with ExitStack() as stack:
        # Plain writes raise on a full disk; a memory map would kill the process.
        opened = [stack.enter_context(open(folder / name, "wb")) for name in shapes]
        for file, (name, shape) in zip(opened, shapes.items(), strict=True):
            _write_header(file, shape, "bool" if name == MASK else dtype)
        done = 0
        for batch in chain(batches, [{name: value[None] for name, value in null.items()}]):
            size = len(batch["text"])
            expected = {k: (size, *v) for k, v in rows.items() if k != "x0" or done < count}
            actual = {k: np.shape(v) for k, v in batch.items()}
            if actual != expected or rows["mask"] != rows["text"][:1]:
                raise ValueError(f"batch: found {actual}; expected {expected}, as the empty prompt")
            for file, name in zip(opened, expected, strict=False):  # the null has no latent
                array = np.asarray(batch[name])
                array = array.astype(bool) if name == "mask" else _cast(array, dtype, done, count)
                file.write(array.tobytes())
            done += size
    if done != count + 1:
        raise ValueError(f"batches of {done - 1} rows for {count} prompts")


def _cast(array: np.ndarray, dtype: str, first: int, count: int) -> np.ndarray:
    """Cast a batch to `dtype`. Raises: InputError naming the prompt with values out of range."""
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    bad = ~np.isfinite(array).all(tuple(range(1, array.ndim)))
    if bad.any():
        number = first + int(bad.argmax())
        name = f"prompt {number + 1}" if number < count else "the empty prompt"
        raise InputError(f"{name}: found values not finite in {dtype}; expected finite")
    return array


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: str) -> None:
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def open_embeddings(folder: Path) -> Embeddings:
    """Open a folder of `write_embeddings`; reads only the headers of the arrays.

    Raises: InputError naming the file that is missing, damaged, or does not match the manifest.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    rows, length = manifest["count"] + 1, manifest["length"]
    text = _open_array(folder / TEXT, (rows, length, manifest["width"]), manifest["dtype"])
    mask = _open_array(folder / MASK, (rows, length), "bool")
    origin, latent, pooled = Origin(manifest["fingerprint"]), None, None
    if "pooled" in manifest:
        pooled = _open_array(folder / POOLED, (rows, manifest["pooled"]), manifest["dtype"])
    if "latent" in manifest:
        origin = replace(origin, vae=manifest["vae"], latent=tuple(manifest["latent"]))
        latent = _open_array(folder / LATENTS, (rows - 1, *origin.latent), manifest["dtype"])
    prompts = read_prompts(folder / PROMPTS)
    if len(prompts) != manifest["count"]:
        raise InputError(
            f"{folder / PROMPTS}: found {len(prompts)} prompts; "
            f"expected {manifest['count']} as in {MANIFEST}"
        )
    null = {"text": np.array(text[-1]), "mask": np.array(mask[-1], np.int32)}
    if pooled is not None:
        null["pooled"], pooled = np.array(pooled[-1]), pooled[:-1]
    parts = text[:-1], mask[:-1], pooled, latent
    return Embeddings(folder, origin, tuple(prompts), *parts, null)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: found no such file; expected a folder written by gadjax embed")
    manifest = read_json(path)
    text = (is_text, "text")
    positive = (_positive, "a positive integer")
    checks = {
        "version": (lambda value: value == VERSION, str(VERSION)),
        "count": positive,
        "length": positive,
        "width": positive,
        "dtype": (lambda value: value in DTYPES, " or ".join(DTYPES)),
        "fingerprint": text,
    }
    if "pooled" in manifest:
        checks |= {"pooled": positive}
    if "latent" in manifest:
        checks |= {"vae": text, "latent": (_is_shape, "three positive integers")}
    for key, (valid, expected) in checks.items():
        if not valid(value := manifest.get(key)):
            raise InputError(f"{path}: found {key} {short_repr(value)}; expected {expected}")
    return manifest


def _positive(value: Any) -> bool:
    return is_count(value, 1, 2**31 - 1)  # NumPy's sizes are products of these


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_positive, value))


def _open_array(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    expected = f"expected {dtype} {shape} as in {MANIFEST}"
    if not path.is_file():  # reading a pipe would hang
        raise InputError(f"{path}: found no such file; {expected}")
    with open_file(path, expected.removeprefix("expected ")):
        pass  # reports a git-lfs pointer in place of the file
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}; {expected}") from error
    except Exception as error:  # a damaged header raises many types
        raise InputError(f"{path}: found a truncated or corrupt file; {expected}") from error
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise InputError(f"{path}: found {array.dtype} {array.shape}; {expected}")
    if size != array.offset + array.nbytes:
        raise InputError(f"{path}: found {size} bytes; {expected}")
    return array
