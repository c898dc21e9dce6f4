"""Identifiers and docstrings use the field's words: see the glossary in CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "gadjax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")])
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_language(path):
    tree = ast.parse(path.read_text())
    problems = [
        f"{path.name}:{line}: identifier {name!r}"
        for name, line in identifiers(tree)
        if words(name) & FORBIDDEN
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            name = getattr(node, "name", "module")
            if text is not None and (text.split()[0] in OPENINGS or len(text.split()) < 3):
                problems.append(f"{path.name}: docstring of {name}: {text.splitlines()[0]!r}")
    assert not problems, "\n".join(problems)


def test_the_check_sees_what_it_forbids():
    tree = ast.parse("def f(own_x, *, told=1):\n    found, y.wholeTime = 1, 2\n    g(say=3)")
    names = [name for name, _ in identifiers(tree) if words(name) & FORBIDDEN]
    assert sorted(names) == ["found", "own_x", "say", "told", "wholeTime"]
    assert not words("shown_rows") & FORBIDDEN and not words("always") & FORBIDDEN
