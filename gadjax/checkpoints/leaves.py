"""Leaves of a PyTree by name."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from gadjax.errors import InputError
from gadjax.parallel.sharding import path_name


def check_leaves(path: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare shapes and dtypes of a checkpoint's leaves with the expected ones.

    Args:
      path: the checkpoint, for error texts.
      stored: its leaves by name, anything with shape and dtype.
      expected: the expected leaves by name.

    Raises: InputError naming the first leaf that differs.
    """
    for name in [*expected, *stored]:
        a, b = _describe(stored.get(name)), _describe(expected.get(name))
        if a != b:
            raise InputError(f"{path}: {name}: found {a}; expected {b}")


def _describe(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """Leaves of a PyTree by their paths, such as "ema/blocks/kernel"."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested_dict(tree: Any) -> dict[str, Any]:
    """The leaves of a PyTree in nested dicts with string keys, as Orbax's metadata requires."""
    root: dict[str, Any] = {}
    for name, leaf in leaves_by_name(tree).items():
        *parents, last = name.split("/")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return root
