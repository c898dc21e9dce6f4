"""Open and parse untrusted files: regular files only, size limits, no symlink escapes."""

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gadjax.errors import InputError
from gadjax.io.storage import is_remote

MIB = 1 << 20
MAX_JSON_BYTES = 16 * MIB  # configurations and manifests; published ones have a few KiB
MAX_INDEX_BYTES = 64 * MIB  # an index of shards, some hundred bytes for each tensor
MAX_DEPTH = 64  # nested JSON values
MAX_NAME_BYTES = 255
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def open_file(path: Path, expected: str) -> Iterator[BinaryIO]:
    """Open a regular file for reading: a pipe would block, and a device has no end.

    expected: description of the file for error messages.

    Raises: InputError where it is missing, unreadable, no regular file or a git-lfs pointer.
    """
    try:
        # O_NONBLOCK: opening a pipe returns at once, too.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except IsADirectoryError:
        raise InputError(f"{path}: found a folder; expected {expected}") from None
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}; expected {expected}") from None
    except ValueError as error:
        reason = "a null byte in its name" if "\0" in str(path) else error
        raise InputError(f"{path}: found {reason}; expected {expected}") from None
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{path}: found no regular file; expected {expected}")
        try:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(
                    f"{path}: found a git-lfs pointer in place of the file; expected {expected} "
                    "(`git lfs pull` there fetches it)"
                )
            file.seek(0)
            yield file
        except OSError as error:
            raise InputError(f"{path}: found {error.strerror}; expected {expected}") from None


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read an untrusted JSON object, from a local path or a store.

    Raises: InputError where it is missing, unreadable, too large or no JSON object.
    """
    expected = "a JSON file"
    if is_remote(path):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: found {error.strerror}; expected {expected}") from None
    else:
        with open_file(path, expected) as file:
            data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise InputError(
            f"{path}: found more than {max_bytes} bytes; expected {expected} of no more"
        )
    try:
        value = parse_json(data)
    except ValueError as error:
        raise InputError(f"{path}: corrupt: found {error}; expected JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: found a {type(value).__name__}; expected a JSON object")
    return value


def parse_json(data: bytes) -> Any:
    """Parse JSON strictly: UTF-8, no duplicate keys, at most MAX_DEPTH nested values.

    NaN and Infinity are accepted: published configurations contain them, and the reader of a number
    reports which one is wrong.

    Raises: ValueError.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} nested values") from None
    _check_depth(value, MAX_DEPTH)
    return value


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} more than once")
    return value


def _check_depth(value: Any, remaining: int) -> None:
    if isinstance(value, dict | list):
        if not remaining:
            raise ValueError(f"more than {MAX_DEPTH} nested values")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, remaining - 1)


def is_number(value: Any, limit: float = 1e9) -> bool:
    """True for a JSON number of moderate size; not for NaN, true and false."""
    return type(value) in (int, float) and abs(value) <= limit


def is_count(value: Any, least: int = 0, most: int = 2**63 - 1) -> bool:
    """True for a whole number from `least` to `most`; not for true and false."""
    return type(value) is int and least <= value <= most


def is_text(value: Any) -> bool:
    """True for a string."""
    return isinstance(value, str)


def is_safe_filename(text: Any) -> bool:
    """True for the name of a file directly in a folder: no path traversal, no unprintable text."""
    return (
        isinstance(text, str)
        and text not in ("", ".", "..")
        and text.isprintable()
        and not {"/", "\\"} & set(text)
        and len(text.encode()) <= MAX_NAME_BYTES
    )


def is_macos_metadata(name: str) -> bool:
    """True for files that macOS adds to a folder; they belong to no format."""
    return name.startswith("._") or name == ".DS_Store"


def check_no_escape(folder: Path, root: Path) -> None:
    """Check that no symlink below `folder` escapes from `root`.

    A link must point to a file in `root`; or, in the hub's cache, whose snapshots are links, to one
    of the same repository.

    Raises: InputError naming a link that escapes or leads to a folder, a pipe or a device.
    """
    allowed = _allowed_roots(root)
    _check_target(folder, allowed)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            try:
                _check_entry(path, allowed)
            except OSError as error:
                raise InputError(
                    f"{path}: found {error.strerror}; expected a file to read"
                ) from None


def check_files_no_escape(folder: Path, root: Path) -> None:
    """Check as `check_no_escape` the files directly in `folder`, not its subfolders."""
    allowed = _allowed_roots(root)
    for path in folder.iterdir():
        if not path.is_dir():
            _check_entry(path, allowed)


def _allowed_roots(root: Path) -> list[Path]:
    root = Path(os.path.realpath(root))
    for place in (root, *root.parents):
        if place.name == "snapshots" and place.parent.name.startswith("models--"):
            return [root, place.parent / "blobs"]
    return [root]


def _check_entry(path: Path, allowed: Sequence[Path]) -> None:
    if path.is_symlink():
        _check_target(path, allowed)
        if path.is_dir():
            raise InputError(f"{path}: found a link to a folder; expected files and folders")
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{path}: found no regular file; expected one")


def _check_target(path: Path, allowed: Sequence[Path]) -> None:
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(place) for place in allowed):
        raise InputError(
            f"{path}: found a link to {target}; expected one into {allowed[0]} (`cp -rL` makes a "
            "folder without links, as `hf download --local-dir` does since huggingface_hub 0.23)"
        )
