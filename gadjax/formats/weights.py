"""Weight files of one pipeline component, under the names of diffusers and transformers."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gadjax.errors import InputError
from gadjax.formats.safetensors_file import Tensor, read_header, target_dtype, write_safetensors
from gadjax.formats.state_dict import MAX_LISTED, all_finite
from gadjax.formats.torch_pickle import PickledTensor, read_pickle
from gadjax.io.untrusted import MAX_INDEX_BYTES, is_macos_metadata, is_safe_filename, read_json

MAX_SHARD_BYTES = 10 * 10**9  # as diffusers splits

# Library -> file name stems of its safetensors and of its pickles.
STEMS = {
    "diffusers": {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"},
    "transformers": {"safetensors": "model", "bin": "pytorch_model"},
}
# The variant stands before the extension, before .json of an index, or, in older indexes, before
# .index or before .safetensors.
WEIGHTS_NAME = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)(\.(?P<variant>\w+))?"
    r"\.(?P<kind>safetensors|bin)"
    r"(?P<index>(\.(?P<older_variant>\w+))?\.index(\.(?P<index_variant>\w+))?\.json)?"
)


@dataclass(frozen=True)
class Weights:
    """Weight files of a component and their tensors, read from the headers.

    Attributes:
      folder: folder of the files.
      variant: variant of the files, such as "fp16"; None for the plain ones.
      files: all files, an index first.
      entries: tensors by key, in the order of the data.
      unused_files: other files of the same weights, which the library does not read.
    """

    folder: Path
    variant: str | None
    files: tuple[Path, ...]
    entries: dict[str, Tensor | PickledTensor]
    unused_files: tuple[Path, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: entry.shape for key, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        return {key: entry.dtype for key, entry in self.entries.items()}

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        return self.stream()

    def stream(self, keys: Collection[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (key, array) one at a time in file order, for all keys or the given ones.

        Raises: InputError naming file and tensor at the first non-finite tensor.
        """
        for key, entry in self.entries.items():
            if keys is not None and key not in keys:
                continue
            value = entry.read()
            if not all_finite(value):
                raise InputError(f"{entry.path}: found NaN or infinity in {key}; expected none")
            yield key, value


def open_weights(
    folder: Path,
    variant: str | None = None,
    *,
    library: str | None = None,
    allow_pickle: bool = False,
) -> Weights:
    """Find a component's weights and read their headers, not their data.

    Args:
      folder: folder of the component.
      variant: "" selects the plain files; None those or, if there are none, the only variant.
      library: "diffusers" or "transformers", which decides file names and precedence; None
        accepts both.
      allow_pickle: also read torch's .bin, with its weights-only reader.

    Returns: the files and their tensors' headers.
    Raises: InputError for an absent or malformed folder, file, shard or header.
    """
    folder = Path(folder)
    (path, *unused), kind, variant = _select_files(folder, variant, library)
    if kind == "bin" and not allow_pickle:
        raise InputError(
            f"{path}: found a pickle, which can run code when it is opened; expected safetensors "
            "(allow_pickle reads it by torch's weights-only reader)"
        )
    read = read_header if kind == "safetensors" else read_pickle
    if path.suffix != ".json":
        return Weights(folder, variant, (path,), read(path), tuple(unused))
    shards = _read_index(path)
    entries: dict[str, Tensor | PickledTensor] = {}
    for shard, keys in shards.items():
        tensors = read(shard)
        if set(tensors) != keys:
            missing, extra = sorted(keys - set(tensors)), sorted(set(tensors) - keys)
            problem = f"no {_some(missing)}" if missing else f"also {_some(extra)}"
            raise InputError(f"{shard}: found {problem}; expected the tensors named by {path.name}")
        entries |= tensors
    return Weights(folder, variant, (path, *shards), entries, tuple(unused))


def component_variant(folder: Path, variant: str | None) -> str | None:
    """The `variant` of `open_weights` for one component of a pipeline read with `variant`.

    As in diffusers, a component without files of that variant falls back to its plain files ("").
    """
    if variant is None:
        return None
    second = (name.split(".")[1] for name in _names(folder) if "." in name)
    return variant if any(part.startswith(variant) for part in second) else ""


def _some(names: list[str]) -> str:
    """Comma-separated names, shortened to the first few and a count."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InputError(f"{folder}: found no such folder; expected one with weights")
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{folder}: found {error.strerror}; expected a folder to read") from None


def _select_files(
    folder: Path, variant: str | None, library: str | None
) -> tuple[list[Path], str, str | None]:
    """Weight files of the selected variant, in order of precedence, with their kind and variant.

    The first is the file or index to read; the others hold the same weights in another form.
    """
    stems = [(name, STEMS[name]) for name in ([library] if library else STEMS)]
    by_kind: dict[str, dict[str | None, list[tuple[int, Path]]]] = {"safetensors": {}, "bin": {}}
    names = _names(folder)
    for owner, stem in stems:
        for match in filter(None, map(WEIGHTS_NAME.fullmatch, names)):
            if match["stem"] == stem[match["kind"]]:
                name = match["variant"] or match["older_variant"] or match["index_variant"]
                ranked = by_kind[match["kind"]].setdefault(name, [])
                ranked.append((_rank(owner, match), folder / match[0]))
    variant, any_variant = variant or None, variant is None
    for kind, variants in by_kind.items():
        if any_variant and None not in variants and len(variants) == 1:
            (variant,) = variants
        if variant in variants:
            return [path for _, path in sorted(variants[variant])], kind, variant
    present = sorted(
        {name or "the plain one" for variants in by_kind.values() for name in variants}
    )
    if present and any_variant:
        raise InputError(
            f"{folder}: found variants {', '.join(present)}; expected one to be chosen"
        )
    if present and variant is None:
        raise InputError(
            f"{folder}: found variants {', '.join(present)}; expected the one asked for, or the "
            "plain one"
        )
    if present:
        raise InputError(f"{folder}: found no variant {variant}; expected {' or '.join(present)}")
    expected = " or ".join(f"{stem['safetensors']}.safetensors" for _, stem in stems)
    raise InputError(
        f"{folder}: found no weights, only {_some(names) or 'nothing'}; expected {expected}, whole "
        "or with an index"
    )


def _rank(library: str, match: re.Match) -> int:
    """Precedence of a weight file in its library, lowest first.

    diffusers prefers an index of safetensors to a single file, transformers the reverse. Neither
    knows the oldest spelling of a variant.
    """
    if not match["index"]:
        return 2
    if match["variant"]:
        return 5
    first = library == "diffusers" and match["kind"] == "safetensors"
    return (0 if first else 3) + bool(match["older_variant"])


def _read_index(path: Path) -> dict[Path, set[str]]:
    """Map each shard of an index to its keys. Raises: InputError where a shard is missing."""
    weight_map = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(is_safe_filename, weight_map.values())):
        raise InputError(f"{path}: found no usable weight_map; expected tensor -> file beside it")
    shards: dict[Path, set[str]] = {}
    for key, name in weight_map.items():
        shards.setdefault(path.parent / name, set()).add(key)
    if missing := sorted(shard.name for shard in shards if not shard.is_file()):
        raise InputError(f"{path}: found no shard {_some(missing)}; expected it beside the index")
    return dict(sorted(shards.items()))


def write_weights(
    folder: Path,
    stem: str,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    variant: str | None = None,
    dtype=None,
) -> list[Path]:
    """Write a component's tensors as one safetensors file or, if too large, shards and an index.

    Args:
      folder: target folder, created if absent.
      stem: diffusion_pytorch_model for a diffusers class, model for one of transformers.
      tensors: (key, array); strided views are made contiguous one at a time.
      max_shard_bytes: size above which a shard is closed.
      variant: variant in the file names; None for plain names.
      dtype: dtype that floating tensors are cast to; None keeps theirs.

    Returns: the files, an index first.
    Raises: InputError naming a tensor that is non-finite in its dtype.
    """
    tensors = dict(tensors)
    shards: list[dict[str, np.ndarray]] = []
    total = filled = 0
    for key, value in tensors.items():
        size = value.size * target_dtype(value, dtype).itemsize
        if not shards or (filled and filled + size > max_shard_bytes):
            shards.append({})
            filled = 0
        shards[-1][key] = value
        filled, total = filled + size, total + size
    folder.mkdir(parents=True, exist_ok=True)
    base = stem if variant is None else f"{stem}.{variant}"
    parts = [f"-{i + 1:05d}-of-{len(shards):05d}" for i in range(len(shards))]
    names = [f"{base}{part if len(shards) > 1 else ''}.safetensors" for part in parts]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, dtype)
    written = [folder / name for name in names]
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {k: n for n, shard in zip(names, shards, strict=True) for k in shard},
        }
        ending = "json" if variant is None else f"{variant}.json"
        written.insert(0, folder / f"{stem}.safetensors.index.{ending}")
        written[0].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return written


def copy_weights(weights: Weights, folder: Path) -> None:
    """Copy weight files unchanged, under names without their variant."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in weights.files:
        target = folder / _plain(path.name, weights.variant)
        if path.suffix != ".json":
            shutil.copyfile(path, target)
            continue
        index = read_json(path, MAX_INDEX_BYTES)
        index["weight_map"] = {
            key: _plain(name, weights.variant) for key, name in index["weight_map"].items()
        }
        target.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_folder(src: Path, dst: Path) -> None:
    """Copy a folder recursively, with the modes of new files: a teacher's may be read-only.

    macOS metadata files (.DS_Store, ._*) are left out.
    """
    dst.mkdir(exist_ok=True)
    for path in sorted(src.iterdir()):
        if path.is_dir():
            copy_folder(path, dst / path.name)
        elif not is_macos_metadata(path.name):
            shutil.copyfile(path, dst / path.name)


def _plain(name: str, variant: str | None) -> str:
    return name if variant is None else name.replace(f".{variant}", "", 1)


def fingerprint(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """Fingerprint of tensors: 32 hex digits of names, shapes, dtypes and values, in any order.

    tensors: opened weights, or `tensors_from_params` of the parameters read from them, which
      gives the same fingerprint.
    """
    digests = []
    for key, value in tensors:
        digest = hashlib.blake2b(f"{key}\0{value.dtype}\0{value.shape}\0".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        digests.append(digest.digest())
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=16).hexdigest()
