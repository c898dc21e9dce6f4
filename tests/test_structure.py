"""Imports point one way only, and nothing needs torch at run time."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gadjax"

# Each may import from itself and from what its row names (modules and packages of gadjax).
MATHS = {"errors", "types", "schedules", "parameterization", "geometry", "ops", "seeds"}
MODELS = MATHS | {"models", "reading", "shown"}
DENOISER = MATHS | {"denoiser", "rollout"}
CONVERT = MODELS | {"convert", "denoiser", "rollout", "assets", "shown"}
CONVERT |= {"samplers", "scheduler_config", "schedulers", "seal", "walks"}
PIPELINE = CONVERT | {"pipeline"}
BENCH = {"errors", "types", "schedules", "parameterization", "denoiser", "rollout"} | {
    "objectives",
    "seeds",
    "settings",
    "training",
}
MAY_IMPORT = {
    "errors": {"shown"},
    "shown": set(),
    "types": set(),
    "assets": set(),
    "storage": {"errors"},
    "reading": {"errors", "storage"},
    "seal": {"errors", "reading", "storage"},
    "schedules": {"errors"},
    "parameterization": {"errors", "schedules", "types"},
    "geometry": {"errors", "ops"},
    "ops": {"errors", "seeds"},
    "seeds": {"errors"},
    "settings": {"seeds"},
    "models": MODELS,
    "denoiser": MATHS,
    "rollout": MATHS,
    "walks": MATHS,
    "samplers": DENOISER,
    "scheduler_config": MATHS | {"shown"},
    "schedulers": DENOISER | {"samplers", "scheduler_config", "walks"},
    "objectives": DENOISER,
    "worlds": {"errors"},
    "data": {"errors", "reading", "seeds", "shown", "types", "worlds"},
    "pipeline": CONVERT,
    "sampling": PIPELINE | {"settings"},
    "students": PIPELINE,
    "libtpu": set(),
    "supervised": set(),
    "supervisor": {"storage", "supervised"},
    "host": {"errors", "reading", "seal", "shown", "storage", "types"},
    "checkpoints": {"errors", "host", "reading", "seal", "storage", "training", "types"},
    "plan": {"errors", "libtpu", "seeds", "settings", "training"},
    "bench": BENCH,
}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_imports(path: Path) -> set[str]:
    """The same for statements that run when the file is imported."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports_point_one_way(part):
    place = PACKAGE / part
    files = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    for path in files:
        names = {n.split(".")[1] for n in imports(path) if n.startswith("gadjax.")}
        assert names <= MAY_IMPORT[part] | {part}, f"{path.name} imports {names}"


def test_nothing_imports_torch_at_the_top():
    for path in PACKAGE.rglob("*.py"):
        heavy = {n.split(".")[0] for n in top_imports(path)} & {"torch", "diffusers", "tensorflow"}
        assert not heavy, f"{path} imports {heavy}"


def test_maths_sees_no_config_logger_or_mesh():
    banned = {"ml_collections", "absl", "logging", "jax.sharding", "tqdm"}
    for part in ("schedules", "parameterization", "geometry", "denoiser", "rollout"):
        assert not imports(PACKAGE / f"{part}.py") & banned
    for path in (PACKAGE / "objectives").glob("*.py"):
        assert not imports(path) & banned, path
