"""The leaves of a training state by name."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from gadjax.errors import InputError
from gadjax.parallel.sharding import path_name


def check_leaves(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare name -> (something with shape and dtype). Raises: InputError naming one leaf."""
    for name in [*wanted, *found]:
        a, b = _kind(found.get(name)), _kind(wanted.get(name))
        if a != b:
            raise InputError(f"{path}: {name}: found {a}; expected {b}")


def _kind(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def names_of(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(tree: Any) -> dict[str, Any]:
    """The same leaves in plain dicts with string keys, which is what Orbax's metadata can hold."""
    found: dict[str, Any] = {}
    for name, leaf in names_of(tree).items():
        *folders, last = name.split("/")
        place = found
        for key in folders:
            place = place.setdefault(key, {})
        place[last] = leaf
    return found
