"""The reading list of docs/architecture.md: its names exist, and it stays short."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
MAX_LINES = 900


def reading_list() -> list[tuple[str, str]]:
    """(file, name) of every row; a method is CLASS.NAME."""
    rows = re.findall(r"^\| `(gadjax/\S+\.py)` \| (.+) \|$", PAGE.read_text(), re.M)
    return [(file, name) for file, names in rows for name in re.findall(r"`([\w.]+)`", names)]


def lines_of(file: str, name: str) -> int:
    """Lines of a definition, decorators and docstring included."""
    node = ast.parse((ROOT / file).read_text())
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    return node.end_lineno - min(n.lineno for n in (node, *node.decorator_list)) + 1


def test_an_update_can_be_read_in_900_lines():
    counts = {entry: lines_of(*entry) for entry in reading_list()}
    assert len(counts) > 20
    assert sum(counts.values()) <= MAX_LINES, counts


def test_the_layers_are_those_of_the_structure_test():
    from test_structure import FLOORS

    block = PAGE.read_text().split("```")[1]
    floors = [
        re.split(r"\s{4,}|(?<=\w)\s{3,}", line.strip())[0].split()
        for line in block.strip().splitlines()
    ]
    assert floors == [floor.split() for floor in FLOORS if "__" not in floor]
