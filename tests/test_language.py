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
# Words that name nothing, and the labels of a docstring's blocks.
FUNCTION_WORDS = set(
    "a all also an and any anything are as at be been before below between both but by can does "
    "either else every everything for from had has have here how i if in into is it its may might "
    "more most must neither no none nor not nothing of off on one only or other others out over "
    "per same should so some something such than that the their them then there these they this "
    "those to too two under until up was were what when where whether which while who whom whose "
    "why will with within without you args returns raises".split()
)


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


def names_a_thing(docstring: str) -> bool:
    """True if the first sentence has two words that are no function words.

    Without a dictionary of nouns: it refuses "By whom." and "A file of them.", and lets others by.
    """
    sentence = re.split(r"(?<=[\w)\]`]{2})\.(?:\s|$)|\n\n", docstring)[0].lower()
    meaningful = set(re.findall(r"[a-z]+", sentence.replace("'s", ""))) - FUNCTION_WORDS
    return len(meaningful) >= 2 and len(docstring.split()) >= 3


def problems(path: Path):
    """Forbidden identifiers and docstrings of a file, one line a problem."""
    tree, name = ast.parse(path.read_text()), path.relative_to(ROOT)
    for identifier, line in identifiers(tree):
        if words(identifier) & FORBIDDEN:
            yield f"{name}:{line}: identifier {identifier!r}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text is not None and (text.split()[0] in OPENINGS or not names_a_thing(text)):
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


def test_a_docstring_names_a_thing():
    for text in ("By whom.", "All of a run's.", "Nothing where it is not there.", "Seconds.", "S."):
        assert not names_a_thing(text), text
    assert not names_a_thing("Raises: OSError.") and not names_a_thing("Both halves.\n\nOf a VAE.")
    for text in ("Trace of the covariance.", "RoPE: rotate pairs of x.", "Undo `scale` for x."):
        assert names_a_thing(text), text
    assert names_a_thing("Convert [-1, 1] to 0 .. 255, and round.")
