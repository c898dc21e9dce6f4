"""A manifest of a folder's files, against bit rot and truncation."""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SEAL = "seal.json"
# Orbax rewrites these when it commits a folder, and restores without reading them.
UNSEALED = ("_CHECKPOINT_METADATA", "commit_success.txt", SEAL)


def write_seal(folder: Path) -> None:
    """Write `seal.json`: {file: {size, crc32}} of every file below `folder`."""
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
    seal = folder / SEAL
    if not seal.exists():
        return None
    try:
        wanted = {name: dict(entry) for name, entry in json.loads(seal.read_text()).items()}
    except (ValueError, TypeError, AttributeError):
        return f"{SEAL} cannot be read"
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda name: _sum(folder / name), wanted)
        for name, sums in zip(wanted, found, strict=True):
            if sums != wanted[name]:
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
    return "CRC-32 differs"
