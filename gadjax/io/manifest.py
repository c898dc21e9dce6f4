"""A manifest of a checkpoint's files, against bit rot, truncation and deletion.

Files of a disk are read for it. An object store sums up its objects itself, and its sums are what
a seal there holds; a folder that moved from one to the other keeps its sizes to compare.
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
WRITTEN_AT_COMMIT = (
    "_CHECKPOINT_METADATA",
    COMMIT_MARKER,
)  # Orbax writes these when it commits a step
OWN = (MANIFEST, f"{MANIFEST}.new")
CHANGED = "its own CRC-32 differs"

Sums = dict[str, dict[str, Any]]


def write_manifest(folder: Path) -> None:
    """Before the commit: sizes and checksums of all files below `folder` but the late ones."""
    _write(folder, _sums(folder, lambda name: name not in OWN + WRITTEN_AT_COMMIT))


def finalize_manifest(folder: Path) -> None:
    """After the commit: those of the late ones too. Raises: OSError; ValueError for a bad seal."""
    wanted, whole = _read(folder)
    if not whole:
        raise ValueError(f"{MANIFEST}: {CHANGED}")
    _write(folder, wanted | _sums(folder, WRITTEN_AT_COMMIT.__contains__))


def verify(folder: Path) -> str | None:
    """The first file that contradicts the seal, and how; None where all agree.

    A run that died right after a commit left its step without the sums of the late files.
    Raises: RunStopped where the disk or the store does not answer: that is no damage.
    """
    try:
        wanted, whole = _read(folder)
        found = _sums(folder, lambda name: name not in OWN)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return f"{MANIFEST}: missing"
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST}: cannot be read"
    except OSError as error:
        if error.errno == errno.EIO and not is_remote(folder):  # a disk that rots says so itself
            return f"{error.filename}: cannot be read: {error.strerror}"
        raise RunStopped(f"{folder}: cannot be read: {error.strerror}") from error
    if not whole:
        return f"{MANIFEST}: {CHANGED}"
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted and name.rpartition("/")[2] not in WRITTEN_AT_COMMIT:
            return f"found {name}, which {MANIFEST} does not name"
        if name in wanted and (difference := _difference(found.get(name), wanted[name])):
            return f"{name}: {difference}"
    return None


def _sums(folder: Path, wants: Callable[[str], bool]) -> Sums:
    if is_remote(folder):
        return {name: sums for name, sums in sorted(list_objects(folder).items()) if wants(name)}
    files = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(filter(wants, (str(path.relative_to(folder)) for path in files)))
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
    """With the seal's own checksum as its last entry, which has no size."""
    own = {MANIFEST: {"crc32": zlib.crc32(json.dumps(sums).encode())}}
    return (json.dumps(sums | own, indent=1) + "\n").encode()


def _read(folder: Path) -> tuple[Sums, bool]:
    """What a seal says of other files, and whether it is bit for bit as it was written."""
    path = folder / MANIFEST
    if not is_remote(path) and path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("a pipe or a device, which may have no end")
    with store_errors(folder):
        data = path.read_bytes()
    entries = {name: dict(entry) for name, entry in parse_json(data).items()}
    sums = {name: entry for name, entry in entries.items() if name != MANIFEST}
    return sums, data == _text(sums)


def _difference(found: dict[str, Any] | None, wanted: dict[str, Any]) -> str | None:
    if found is None:
        return "missing"
    if found["size"] != wanted.get("size"):
        return f"found {found['size']} bytes, expected {wanted.get('size')}"
    if any(found[key] != wanted[key] for key in found.keys() & wanted.keys()):
        return "its checksum differs" if "crc32c" in found else "CRC-32 differs"
    return None
