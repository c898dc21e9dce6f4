"""Integrity manifest of a checkpoint: sizes and checksums against bit rot, truncation and deletion.

Local files are read to compute their CRC-32. An object store computes checksums (CRC-32C) itself,
and a manifest there holds those; after a move from one to the other only sizes can be compared.
"""

import errno
import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gadjax.errors import RunStopped
from gadjax.io.storage import is_remote, list_objects, store_errors, write_atomic
from gadjax.io.untrusted import parse_json

MANIFEST = "manifest.json"
COMMIT_MARKER = "commit_success.txt"
WRITTEN_AT_COMMIT = ("_CHECKPOINT_METADATA", COMMIT_MARKER)  # by Orbax
MANIFEST_FILES = (MANIFEST, f"{MANIFEST}.new")
SELF_MISMATCH = "its own CRC-32 differs"

Sums = dict[str, dict[str, Any]]


def write_manifest(folder: Path) -> None:
    """Write the manifest before the commit: sizes and checksums of all files below `folder` but
    those that are written at the commit."""
    _write(folder, _sums(folder, lambda name: name not in MANIFEST_FILES + WRITTEN_AT_COMMIT))


def finalize_manifest(folder: Path) -> None:
    """Add the files that were written at the commit to the manifest.

    Raises: OSError; ValueError where the manifest is damaged.
    """
    expected, intact = _read(folder)
    if not intact:
        raise ValueError(f"{MANIFEST}: {SELF_MISMATCH}")
    _write(folder, expected | _sums(folder, WRITTEN_AT_COMMIT.__contains__))


def verify(folder: Path) -> str | None:
    """Verify a folder against its manifest.

    A run that died right after a commit left its step without the checksums of the files that are
    written at the commit.

    Returns: the first mismatch, with the file's name; None where all files agree.
    Raises: RunStopped where the disk or the store does not answer: that is no damage.
    """
    try:
        expected, intact = _read(folder)
        actual = _sums(folder, lambda name: name not in MANIFEST_FILES)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return f"{MANIFEST}: missing"
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST}: cannot be read"
    except OSError as error:
        if error.errno == errno.EIO and not is_remote(folder):  # the disk reports the damage itself
            return f"{error.filename}: cannot be read: {error.strerror}"
        raise RunStopped(f"{folder}: cannot be read: {error.strerror}") from error
    if not intact:
        return f"{MANIFEST}: {SELF_MISMATCH}"
    for name in sorted(expected.keys() | actual.keys()):
        if name not in expected and name.rpartition("/")[2] not in WRITTEN_AT_COMMIT:
            return f"found {name}, which {MANIFEST} does not name"
        if name in expected and (difference := _difference(actual.get(name), expected[name])):
            return f"{name}: {difference}"
    return None


def _sums(folder: Path, includes: Callable[[str], bool]) -> Sums:
    if is_remote(folder):
        return {name: sums for name, sums in sorted(list_objects(folder).items()) if includes(name)}
    files = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(filter(includes, (str(path.relative_to(folder)) for path in files)))
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: _sum(folder / name), names), strict=True))


def _sum(path: Path) -> dict[str, Any]:
    crc = size = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(2**22):
                crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    except OSError as error:
        error.filename = path
        raise
    return {"size": size, "crc32": crc}


def _write(folder: Path, sums: Sums) -> None:
    write_atomic(folder / MANIFEST, _text(sums))


def _text(sums: Sums) -> bytes:
    """Serialise a manifest; its last entry, which has no size, is its own checksum."""
    self_entry = {MANIFEST: {"crc32": zlib.crc32(json.dumps(sums).encode())}}
    return (json.dumps(sums | self_entry, indent=1) + "\n").encode()


def _read(folder: Path) -> tuple[Sums, bool]:
    """Read a manifest: the entries of other files, and whether it is intact bit for bit."""
    path = folder / MANIFEST
    if not is_remote(path) and path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("a pipe or a device, which may have no end")
    with store_errors(folder):
        data = path.read_bytes()
    entries = {name: dict(entry) for name, entry in parse_json(data).items()}
    sums = {name: entry for name, entry in entries.items() if name != MANIFEST}
    return sums, data == _text(sums)


def _difference(actual: dict[str, Any] | None, expected: dict[str, Any]) -> str | None:
    if actual is None:
        return "missing"
    if actual["size"] != expected.get("size"):
        return f"found {actual['size']} bytes, expected {expected.get('size')}"
    if any(actual[key] != expected[key] for key in actual.keys() & expected.keys()):
        return "its checksum differs" if "crc32c" in actual else "CRC-32 differs"
    return None
