"""A manifest of a folder's files, against bit rot and truncation.

Files of a disk are read for it. An object store sums up its objects itself, and its sums are what
a seal there holds; a folder that moved from one to the other keeps its sizes to compare.
"""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gadjax.storage import is_remote, listing, put

SEAL = "seal.json"
COMMIT = "commit_success.txt"  # Orbax's, in a step that was written where nothing is renamed
# Orbax rewrites these when it commits a folder, and restores without reading them.
UNSEALED = ("_CHECKPOINT_METADATA", COMMIT, SEAL)


def write_seal(folder: Path) -> None:
    """Write `seal.json`: {file: {size, crc32}} of every file below `folder`."""
    if is_remote(folder):
        found = sorted(listing(folder).items())
        seal = {name: entry for name, entry in found if name.rpartition("/")[2] not in UNSEALED}
        return put(folder / SEAL, (json.dumps(seal, indent=1) + "\n").encode())
    files = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in UNSEALED
    )
    with ThreadPoolExecutor(4) as pool:
        sums = pool.map(lambda name: _sum(folder / name), files)
        seal = dict(zip(files, sums, strict=True))
    (folder / SEAL).write_text(json.dumps(seal, indent=1) + "\n")


def find_fault(folder: Path) -> str | None:
    """The first file that contradicts the seal, and how; None where all agree or none is there."""
    seal, objects = folder / SEAL, listing(folder) if is_remote(folder) else None
    if not seal.exists():
        return None
    try:
        wanted = {name: dict(entry) for name, entry in json.loads(seal.read_text()).items()}
    except (ValueError, TypeError, AttributeError):
        return f"{SEAL} cannot be read"
    with ThreadPoolExecutor(4) as pool:
        one = objects.get if objects is not None else lambda name: _sum(folder / name)
        for name, sums in zip(wanted, pool.map(one, wanted), strict=True):
            both = {"size", *wanted[name]} & {"size", *(sums or ())}
            if sums is None or any(sums.get(key) != wanted[name].get(key) for key in both):
                return f"{name}: {_difference(sums, wanted[name])}"
    return None


def _sum(path: Path) -> dict[str, int] | None:
    if not path.is_file():
        return None
    crc = size = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"size": size, "crc32": crc}


def _difference(found: dict | None, wanted: dict) -> str:
    if found is None:
        return "missing"
    if found["size"] != wanted.get("size"):
        return f"found {found['size']} bytes, expected {wanted.get('size')}"
    return "its checksum differs" if "crc32c" in found else "CRC-32 differs"
