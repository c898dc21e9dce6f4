"""Traffic of a compiled program between chips: its collectives, read from the HLO text."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "u4": 4, "s4": 4, "c64": 64, "c128": 128}
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
LINE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
# A TPU spreads one collective over several fusions, so that others hide it, and over the loops
# between its start and its end; all have its channel number.
PART = re.compile(r"channel_id=\d+")


class Traffic(NamedTuple):
    """Bytes that a chip sends each time a program runs, by kind of collective.

    unknown: loops with traffic in them that were counted once, because their length could not be
      read.
    """

    sent: dict[str, float]
    unknown: int


def traffic(text: str, devices: int) -> Traffic:
    """Traffic of a compiled program for `devices` chips. text: its HLO.

    On a ring of n chips a chip sends (n - 1)/n of what all-gather collects, reduce-scatter sums or
    all-to-all exchanges, twice that for all-reduce, and all of it for collective-permute. A loop's
    body counts as often as it runs; of an asynchronous pair the start counts and the end does not.
    """
    blocks, entry = _blocks(text)
    total: Counter = Counter()
    spread: dict[Any, tuple[float, str, float]] = {}  # collective -> times, kind, bytes
    unknown = 0

    def walk(name: str, times: int) -> bool:
        """Add the traffic of a computation that runs `times` times; true if there is any."""
        nonlocal unknown
        sends = False
        for shape, op, rest in blocks.get(name, ()):
            kind = op.removesuffix("-start")
            if kind in KINDS:
                total[kind] += times * _sent(kind, shape, op != kind, rest, devices)
                sends = True
            elif op == "fusion":
                for inner in _called(rest):
                    for place, (shape, op, rest) in enumerate(blocks.get(inner, ())):
                        if op not in KINDS:
                            continue
                        part = PART.findall(rest)
                        key = part[0] if part else (inner, place)
                        # Where it is also spread into a loop, it still runs only once.
                        fewest = min(times, spread[key][0]) if key in spread else times
                        spread[key] = fewest, op, _sent(op, shape, False, rest, devices)
                        sends = True
            elif not op.endswith(("-done", "-update")):
                trips = _trips(rest, blocks) if op == "while" else 1
                for inner in _called(rest):
                    inner_sends = walk(inner, times * (trips or 1))
                    unknown += inner_sends and trips is None
                    sends |= inner_sends
        return sends

    walk(entry, 1)
    for times, kind, sent in spread.values():
        total[kind] += times * sent
    return Traffic({kind: float(total[kind]) for kind in KINDS if total[kind]}, unknown)


def _blocks(text: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """Instructions (shape, operation, rest of the line) by computation, and the entry's name."""
    blocks, entry, current = {}, "", None
    for line in text.splitlines():
        if head := HEAD.match(line):
            current = blocks.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (match := LINE.match(line)):
            shape, rest = _shape(match[1])
            op, bracket, _ = rest.partition("(")
            if bracket:
                current.append((shape, op, rest[len(op) :]))
    return blocks, entry


def _shape(text: str) -> tuple[str, str]:
    """Split '(f32[2]{0}, u32[]) op(...)' into the shape and the rest."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == " " and not depth:
            return text[:place], text[place + 1 :]
    return text, ""


def _parts(shape: str) -> list[str]:
    """Elements of a tuple's shape, or the shape itself."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for place, letter in enumerate(shape):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 1 and letter == "," or depth == 0:
            parts.append(shape[start:place])
            start = place + 1
    return parts


def _bytes(shape: str) -> float:
    def size(kind: str, sides: str) -> float:
        bits = BITS.get(kind) or int(kind[1:])
        return bits / 8 * math.prod(int(side) for side in sides.split(",") if side)

    return sum(size(*match) for match in ARRAY.findall(shape))


def _sent(kind: str, shape: str, started: bool, rest: str, devices: int) -> float:
    parts = _parts(shape)
    # A start returns its operands, then its results; all-reduce returns the latter alone.
    result = _bytes(parts[1] if started and kind != "all-reduce" and len(parts) > 1 else shape)
    n = _group(rest, devices)
    share = (n - 1) / n
    scale = {"all-reduce": 2 * share, "reduce-scatter": n - 1, "collective-permute": 1}
    return result * scale.get(kind, share)


def _group(rest: str, devices: int) -> int:
    """Number of chips in one group of a collective."""
    if match := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        # An axis, or a part of one: 'a' or 'a':(before)size.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(match[1].split(","))
    return devices


def _called(rest: str) -> Iterator[str]:
    for one, several in CALLED.findall(rest):
        yield from [one] if one else re.findall(r"[\w.\-]+", several)


def _trips(rest: str, blocks) -> int | None:
    """Trip count of a while loop, from its annotation or else the constant in its condition."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    lines = blocks.get(condition[1], ()) if condition else ()
    limits = [
        int(match[1])
        for shape, op, line in lines
        if op == "constant" and (match := re.match(r"\((\d+)\)", line))
    ]
    return limits[0] if len(limits) == 1 else None
