"""Hostile versions of a valid input: flipped, cut, doubled, and JSON that lies."""

import json
import os
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Special:
    """What stands where a file was. kind: "folder", "fifo" or "link"; target: of the link."""

    kind: str
    target: str = ""


Tree = dict[str, bytes | Special]  # path in the folder -> content

FEW = (1, 1, 1, 2, 3)
DEPTH, DIGITS = 100_000, 5_000
DEEP, LONG = "@deep@", "@digits@"  # stand for what json.dumps refuses to write
RAW = {
    f'"{DEEP}"': "[" * DEPTH + "]" * DEPTH,
    f'"{LONG}"': "9" * DIGITS,
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -2.5, 1e308, 1e-308, 2**31, 2**63, 2**64, 10**30),
    *(float("nan"), float("inf"), -float("inf"), DEEP, LONG, "", [], {}, [[]], [None], {"a": None}),
    *("a", "../a", "/etc/passwd", "/dev/zero", "a\nb", "a\0b", "\x1b[31m", "\u202e", "\u2028"),
    *("\ud800", "x" * 20_000, "True", "1", "None", "__class__", "{}", "%s", "<script>", "`|"),
)
BYTES = (b"\0", b"\r", b"\n", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[2J", b'"', b"{", b"\x80")
# Opened by pickle it makes a folder "ran" where the reader runs, which is noticed.
PICKLE = b"cos\nmkdir\n(S'ran'\ntR."


def read_tree(folder: Path) -> Tree:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def write_tree(tree: Tree, folder: Path) -> None:
    """Into an empty folder; what cannot lie there (a file below a file) is left out."""
    for name, content in tree.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content.kind == "folder":
                path.mkdir()
            elif content.kind == "fifo":
                os.mkfifo(path)
            else:
                path.symlink_to(content.target)
        except (FileExistsError, NotADirectoryError):
            continue


def mutate(tree: Tree, rng: random.Random) -> Tree:
    """Another tree, of which 1 to 3 files are changed: more often one, a little, so that what is
    wrong is not noticed at once."""
    found = dict(tree)
    for _ in range(rng.choice(FEW)):
        if not found:
            break
        # By folder first: a dozen small files must not hide the one that matters.
        parents = sorted({os.path.dirname(name) for name in found})
        parent = rng.choice(parents)
        name = rng.choice(sorted(name for name in found if os.path.dirname(name) == parent))
        if rng.random() < 0.05:
            _replace(found, name, rng)
        elif isinstance(content := found[name], bytes):
            found[name] = _content(name, content, rng)
    return found


def _replace(tree: Tree, name: str, rng: random.Random) -> None:
    """The file by something that is none, by another file, or by nothing."""
    other = rng.choice(sorted(tree))
    kinds = {
        "gone": None,
        "empty": b"",
        "folder": Special("folder"),
        "fifo": Special("fifo"),
        "pickle": PICKLE,
        "other": tree[other],
        "outside": Special("link", "/etc/passwd"),
        "device": Special("link", "/dev/zero"),
        "loop": Special("link", os.path.basename(name)),
        "dangling": Special("link", "nowhere"),
    }
    content = kinds[rng.choice(sorted(kinds))]
    if content is None:
        del tree[name]
    else:
        tree[name] = content


def _content(name: str, data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.85:
        if name.endswith(".safetensors"):
            return _safetensors(data, rng)
        if name.endswith(".json"):
            return mutate_json(data, rng)
        if name.endswith(".jsonl"):
            lines = data.split(b"\n")
            i = rng.randrange(len(lines))
            return b"\n".join([*lines[:i], mutate_json(lines[i], rng), *lines[i + 1 :]])
    return mutate_bytes(data, rng)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bit flips, cuts, insertions, doubled pieces."""
    kind, size = rng.randrange(7), len(data)
    start = rng.randrange(size + 1)
    length = min(rng.choice((1, 2, 4, 8, 64, 1024)), size - start)
    if kind == 0 and size:
        found = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            # Half of them near the start, where headers are.
            i = rng.randrange(min(size, 256) if rng.random() < 0.5 else size)
            found[i] ^= 1 << rng.randrange(8)
        return bytes(found)
    if kind == 1:
        return data[:start]
    if kind == 2:
        return data[:start] + data[start + length :]
    if kind == 3:
        return data[:start] + data[start : start + length] * rng.randint(2, 5) + data[start:]
    if kind == 4:
        hostile = (
            b"\0",
            b"\r",
            b"\n",
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b"\x1b[2J",
            b'"',
            b"{",
            b"\x80",
        )
        return data[:start] + rng.choice(hostile) * rng.randint(1, 4) + data[start:]
    if kind == 5:
        return data[:start] + rng.randbytes(length) + data[start + length :]
    return data + data[:length]


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """The same structure with 1 to 3 values, keys or entries of another kind."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    for _ in range(rng.choice(FEW)):
        value = _changed(value, rng, 0.02)
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    for stand_in, raw in RAW.items():
        text = text.replace(stand_in, raw)
    if rng.random() < 0.05 and text.startswith('{"'):  # a key that comes twice
        key = text[1 : text.index('"', 2) + 1]
        text = "{" + f"{key}: {json.dumps(rng.choice((None, 1, 'x', [])))}, " + text[1:]
    return text.encode()


def _changed(value: Any, rng: random.Random, replaced: float = 0.1) -> Any:
    """A copy with one place in it changed. whole: the chance that it is all of it."""
    if not isinstance(value, dict | list) or not value or rng.random() < replaced:
        return _hostile(value, rng)
    kind = rng.random()
    if isinstance(value, dict):
        found, key, other = dict(value), rng.choice(list(value)), rng.choice(list(value))
        if kind < 0.08:
            del found[key]
        elif kind < 0.12:
            found[str(rng.choice(VALUES))[:300]] = found[key]
        elif kind < 0.2:
            found[other] = found[key]
        else:
            found[key] = _changed(found[key], rng)
        return found
    found, i = list(value), rng.randrange(len(value))
    if kind < 0.1:
        del found[i]
    elif kind < 0.2:
        found.insert(i, found[i])
    elif kind < 0.23:
        found *= rng.choice((2, 1000))
    else:
        found[i] = _changed(found[i], rng)
    return found


def _hostile(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value if rng.random() < 0.5 else rng.choice(VALUES)
    if isinstance(value, int | float) and rng.random() < 0.7:
        near = [-value, value + 1, value - 1, value * 2, value * 1000, 0]
        if abs(value) < 1e300:  # beyond that they raise
            near += [value / 2, float(value), str(value)]
        return rng.choice((*near, 1, 3, 100, 5000, 10**6))
    if isinstance(value, str) and rng.random() < 0.3:
        return rng.choice((value[1:], value[:-1], value * 2, value + " ", value.upper()))
    return rng.choice(VALUES)


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    """Header of another length or content, or other data."""
    if len(data) < 8:
        return mutate_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    kind = rng.random()
    if kind < 0.15:
        lie = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", lie % 2**64) + data[8:]
    if kind < 0.3:
        return data[: 8 + length] + mutate_bytes(data[8 + length :], rng)
    header = mutate_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
