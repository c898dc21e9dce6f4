"""Identifiers and docstrings use the field's words: see the glossary in CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "gadjax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")])
ROOMS = {}  # files by top-level entry of gadjax, and the configs
for file in FILES:
    top, entry, *_ = file.relative_to(ROOT).with_suffix("").parts
    ROOMS.setdefault(entry if top == "gadjax" else top, []).append(file)
FORBIDDEN = set(
    "told untold said say says tell tells look seen found wanted each own whole beside anew way "
    "bear".split()
)
OPENINGS = {"What", "Whether", "Of", "By", "As", "For", "Where", "How"}


def identifiers(tree: ast.AST):
    """Names that the file binds, with their lines: definitions, arguments, assignments, imports."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.ExceptHandler(name=str(name)) | ast.keyword(arg=str(name)):
                yield name, node.lineno
            case ast.alias(asname=str(name)):
                yield name, node.lineno


def words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def problems(path: Path):
    """Forbidden identifiers and docstrings of a file, one line a problem."""
    tree, name = ast.parse(path.read_text()), path.relative_to(ROOT)
    for identifier, line in identifiers(tree):
        if words(identifier) & FORBIDDEN:
            yield f"{name}:{line}: identifier {identifier!r}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text is not None and (text.split()[0] in OPENINGS or len(text.split()) < 3):
                line = node.body[0].lineno
                yield f"{name}:{line}: docstring {text.splitlines()[0]!r}"


@pytest.mark.parametrize("room", ROOMS)
def test_language(room):
    lines = [line for path in ROOMS[room] for line in problems(path)]
    assert not lines, "\n".join(lines)


def test_the_check_sees_what_it_forbids():
    tree = ast.parse("def f(own_x, *, told=1):\n    found, y.wholeTime = 1, 2\n    g(say=3)")
    names = [name for name, _ in identifiers(tree) if words(name) & FORBIDDEN]
    assert sorted(names) == ["found", "own_x", "say", "told", "wholeTime"]
    assert not words("shown_rows") & FORBIDDEN and not words("always") & FORBIDDEN
