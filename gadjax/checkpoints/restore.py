"""Restore a step of a run: its training state onto a mesh, or the parameters of one network."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gadjax.checkpoints.leaves import check_leaves, leaves_by_name, nested_dict
from gadjax.checkpoints.steps import committed_steps, latest_valid_step
from gadjax.errors import InputError, RunStopped, check_choice
from gadjax.io.manifest import verify
from gadjax.io.storage import absolute
from gadjax.parallel.sharding import path_name
from gadjax.types import Params, PyTree

PARTS = {"ema": ("ema",), "student": ("params", "student"), "critic": ("params", "critic")}


def read_state(path: Path, abstract: PyTree) -> tuple[PyTree, dict]:
    """Restore state and meta of the valid step in `path`.

    abstract, and what is raised: as `Checkpoints.restore`.
    """
    with _restoring(path):
        check_leaves(path, leaves_by_name(_metadata(path)), leaves_by_name(abstract))
        args = ocp.args.StandardRestore(nested_dict(abstract))
        leaves = leaves_by_name(ocp.StandardCheckpointHandler().restore(path / "state", args=args))
        state = jax.tree_util.tree_map_with_path(lambda p, _: leaves[path_name(p)], abstract)
        return state, _read_meta(path)


def read_params(
    folder: Path, part: str = "ema", step: int | None = None
) -> tuple[int, Params, dict]:
    """Read the parameters of one network from a run's checkpoints.

    Needs no mesh and no model, and reads no other arrays (but every file, for the checksums).

    Args:
      folder: folder of the checkpoints.
      part: "ema", "student" or "critic".
      step: number of the step; None: the latest valid one.

    Returns: (step, nested dict of numpy arrays, meta).
    Raises: InputError where there is no such checkpoint or part, or where `step` is damaged;
      RunStopped where there are checkpoints but no valid one.
    """
    folder = absolute(folder)
    check_choice("part", part, PARTS)
    steps = committed_steps(folder)
    if not steps or step is not None and step not in steps:
        listed = ", ".join(map(str, steps)) or "no checkpoint"
        raise InputError(f"{folder}: found {listed}; expected {'one' if step is None else step}")
    if step is not None and (fault := verify(folder / str(step))):
        raise InputError(f"{folder / str(step)}: found a damaged checkpoint ({fault})")
    if step is None:
        step, skipped = latest_valid_step(folder)
    if step is None:
        raise RunStopped(no_valid_step(folder, skipped))
    path = folder / str(step)
    with _restoring(path):
        return step, _read_part(path, part), _read_meta(path)


def _read_part(path: Path, part: str) -> Params:
    item: Any = _metadata(path)
    for name in PARTS[part]:
        item = item.get(name, {})
    if not item:
        raise InputError(f"{path}: found no {part}; expected a run that trains one")
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    for name in reversed(PARTS[part]):
        item, args = {name: item}, {name: args}
    handler = ocp.PyTreeCheckpointHandler()
    params = handler.restore(
        path / "state", args=ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)
    )
    for name in PARTS[part]:
        params = params[name]
    return params


def _read_meta(path: Path) -> dict:
    return ocp.JsonCheckpointHandler().restore(path / "meta", args=ocp.args.JsonRestore())


def _metadata(path: Path) -> dict[str, Any]:
    """Shapes and dtypes of a step's leaves, nested."""
    return ocp.PyTreeCheckpointHandler().metadata(path / "state").tree


@contextmanager
def _restoring(path: Path) -> Iterator[None]:
    """Turn an exception while restoring into RunStopped.

    The checksums match, so the cause is memory, storage or the caller.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise RunStopped(f"{path}: cannot be restored: {error_line(error)}") from error


def no_valid_step(folder: Path, skipped: list[Path]) -> str:
    """Message for a folder with checkpoints but no valid one; skipped: the damaged steps."""
    steps = ", ".join(path.name for path in skipped) or "only damaged ones"
    return f"{folder}: found damaged checkpoints ({steps}); expected a valid one"


def error_line(error: Exception) -> str:
    """Reason of an error of the file system or of Orbax, at most 200 characters of one line."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    for reason in ("No space left on device", "Disk quota exceeded", "Permission denied"):
        if reason in text:  # within a long message of Orbax
            return reason
    return text[:200] or type(error).__name__
