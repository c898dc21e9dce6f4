"""Files from elsewhere, opened so that none hangs, fills the memory or leads out of its folder."""

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
MAX_JSON_BYTES = 16 * MIB  # of a configuration or a manifest; published ones have a few KiB
MAX_INDEX_BYTES = 64 * MIB  # of an index of shards; some hundred bytes for each tensor
DEPTH = 64  # of values inside values
NAME_LIMIT = 255  # bytes of a file's name
POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def open_file(path: Path, expected: str) -> Iterator[BinaryIO]:
    """A regular file, to be read: a pipe would block, and a device has no end.

    Raises: InputError where there is none, it cannot be read, or is something else.
    """
    try:
        # Of a pipe, too, this returns at once.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except IsADirectoryError:
        raise InputError(f"{path}: found a folder; expected {expected}") from None
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}; expected {expected}") from None
    except ValueError as error:
        found = "a null byte in its name" if "\0" in str(path) else error
        raise InputError(f"{path}: found {found}; expected {expected}") from None
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{path}: found no regular file; expected {expected}")
        try:
            if file.read(len(POINTER)) == POINTER:
                raise InputError(
                    f"{path}: found a git-lfs pointer in place of the file; expected {expected} "
                    "(`git lfs pull` there fetches it)"
                )
            file.seek(0)
            yield file
        except OSError as error:
            raise InputError(f"{path}: found {error.strerror}; expected {expected}") from None


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object, also of a store. limit: of bytes.

    Raises: InputError when it is absent, unreadable, too large or something else.
    """
    expected = "a JSON file"
    if is_remote(path):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: found {error.strerror}; expected {expected}") from None
    else:
        with open_file(path, expected) as file:
            data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{path}: found more than {limit} bytes; expected {expected} of no more")
    try:
        value = parse_json(data)
    except ValueError as error:
        raise InputError(f"{path}: corrupt: found {error}; expected JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: found a {type(value).__name__}; expected a JSON object")
    return value


def parse_json(data: bytes) -> Any:
    """What a JSON text says, where it can be read in one way only. NaN and Infinity are let
    through: published configurations have them, and who reads a number says which one is wrong.

    Raises: ValueError.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ValueError(f"more than {DEPTH} values inside values") from None
    _check_depth(value, DEPTH)
    return value


def _without_doubles(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} more than once")
    return found


def _check_depth(value: Any, room: int) -> None:
    if isinstance(value, dict | list):
        if not room:
            raise ValueError(f"more than {DEPTH} values inside values")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, room - 1)


def is_safe_filename(text: Any) -> bool:
    """Whether it names a file in a folder, and nothing outside."""
    return (
        isinstance(text, str)
        and text not in ("", ".", "..")
        and text.isprintable()
        and not {"/", "\\"} & set(text)
        and len(text.encode()) <= NAME_LIMIT
    )


def is_macos_metadata(name: str) -> bool:
    """Whether a file is one that a Mac puts beside others: it belongs to no format."""
    return name.startswith("._") or name == ".DS_Store"


def check_no_escape(folder: Path, root: Path) -> None:
    """Look through a folder of `root`, all of it, and through the files that lie beside it.

    A link must lead to a file in `root`; or, in the hub's cache, whose snapshots are links, to one
    of the same repository.
    Raises: InputError naming a link that leads elsewhere, a pipe or a device.
    """
    allowed = _allowed(root)
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
    """The same for the files in a folder alone, not for the folders in it."""
    allowed = _allowed(root)
    for path in folder.iterdir():
        if not path.is_dir():
            _check_entry(path, allowed)


def _allowed(root: Path) -> list[Path]:
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
