"""Imports point one way only, and nothing needs torch at run time."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gadjax"

# The rooms, top-level modules and folders of gadjax, on their floors: each imports from itself and
# from floors before its own, and from no other.
FLOORS = (
    "types errors assets",
    "seeds",
    "io parallel worlds",
    "ops data runtime",
    "checkpoints diffusion models",
    "objectives formats",
    "pipelines features",
    "training evaluation",
    "api plan analytic",
    "experiments repair",
    "cli",
    "__init__ __main__",  # the front doors
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(("gadjax", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in FILES}
MODULES |= {name.removesuffix(".__init__") for name in MODULES}

MAX_LINES, MAX_ARGUMENTS = 60, 6  # lines of a function without its docstring
# Their arguments are those of the mathematics: arrays, their tangents, residuals and cotangents.
KERNELS = {"ops/dual_attention", "ops/kernels", "ops/pallas_gpu", "ops/pallas_tpu"}
LARGE = {  # function -> the reason why it may be larger
    "api.distill": "public: its arguments are the command's main options",
    "api.sample": "public: its arguments are the command's main options",
    "training/config.default_config": "a table: one line an option",
}


def room_of(path: Path) -> str:
    """Of a file of the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it: also in functions and for types alone, and
    modules that are named in strings for importlib."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and node.value in MODULES - {"gadjax"}:
            found.add(node.value)
    return found | {name.rpartition(".")[0] for name in found if "." in name} - {"gadjax"}


def rooms_of(path: Path) -> set[str]:
    """The rooms of gadjax that a file imports from; the package itself, where it is for something
    that only its __init__ has."""
    names = [name.split(".") for name in imports(path) if f"{name}.".startswith("gadjax.")]
    return {name[1] if len(name) > 1 and name[1] in FLOOR else "__init__" for name in names}


def top_imports(path: Path) -> set[str]:
    """Names of modules in statements that run when the file is imported."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def functions(path: Path):
    """Functions and methods of a file with their names; not __init__ of networks, whose arguments
    are those of the diffusers class."""
    for node in ast.walk(ast.parse(path.read_text())):
        for child in ast.iter_child_nodes(node):
            network = room_of(path) == "models" and getattr(child, "name", "") == "__init__"
            if isinstance(child, ast.FunctionDef) and not network:
                yield child, isinstance(node, ast.ClassDef)


def size(function: ast.FunctionDef, is_method: bool) -> tuple[int, int]:
    """Lines without the docstring, and arguments without self."""
    lines, first, args = function.end_lineno - function.lineno + 1, function.body[0], function.args
    if ast.get_docstring(function) is not None:
        lines -= first.end_lineno - first.lineno + 1
    plain = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    count = len(plain) + (args.vararg is not None) + (args.kwarg is not None)
    has_self = is_method and plain and plain[0].arg in ("self", "cls")
    return lines, count - bool(has_self)


def test_functions_are_short():
    """No more than MAX_LINES of code and MAX_ARGUMENTS, with reasons for the exceptions."""
    large = {}
    for path in FILES:
        module = str(path.relative_to(PACKAGE).with_suffix(""))
        for function, is_method in functions(path):
            lines, arguments = size(function, is_method)
            if (lines > MAX_LINES or arguments > MAX_ARGUMENTS) and module not in KERNELS:
                large[f"{module}.{function.name}"] = f"{lines} lines, {arguments} arguments"
    assert large.keys() - LARGE.keys() == set(), large
    assert LARGE.keys() - large.keys() == set(), "exceptions that are none any more"


def test_every_module_is_in_a_room():
    assert {room_of(path) for path in FILES} == FLOOR.keys()
    assert len(FLOOR) == len(" ".join(FLOORS).split())


@pytest.mark.parametrize("room", FLOOR)
def test_imports_point_down(room):
    before = {other for other in FLOOR if FLOOR[other] < FLOOR[room]}
    for path in FILES:
        if room_of(path) == room:
            up = rooms_of(path) - before - {room}
            assert not up, f"{path.relative_to(PACKAGE)} imports from {', '.join(sorted(up))}"


def test_nothing_imports_experiments():
    """Which are not in the wheel."""
    for path in FILES:
        assert room_of(path) == "experiments" or "experiments" not in rooms_of(path), path


def test_nothing_imports_torch_at_the_top():
    for path in FILES:
        heavy = {n.split(".")[0] for n in top_imports(path)} & {"torch", "diffusers", "tensorflow"}
        assert not heavy, f"{path} imports {heavy}"


def test_maths_sees_no_config_logger_or_mesh():
    banned = {"ml_collections", "absl", "logging", "jax.sharding", "tqdm"}
    for room in ("diffusion", "objectives"):
        for path in (PACKAGE / room).rglob("*.py"):
            assert not imports(path) & banned, path


def test_families_are_records():
    """Their attributes and their networks' options are never strings: a missing one fails."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Name(id="getattr" | "hasattr"), args=[of, ast.Constant(), *_]
                ):
                    owner = ast.unparse(of).split(".")[-1]
                    assert owner not in {"family", "FAMILY", "spec"}, (path, node.lineno)


def test_supervisor_answers_without_jax():
    """It watches runs of others' programs too, and ends them when JAX does not answer."""
    imported, waiting = set(), ["gadjax.runtime.supervisor"]
    while waiting:
        name = waiting.pop()
        path = PACKAGE.joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        found = imports(path)
        assert not {n.split(".")[0] for n in found} & {"jax", "numpy"}, name
        waiting += found & MODULES - imported
        imported |= found & MODULES
    assert {name.split(".")[1] for name in imported} == {"errors", "io", "runtime"}
