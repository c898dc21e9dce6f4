"""Parameters as nested dicts: flat, in parts, in another dtype."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from gadjax.types import Params


def flatten(params: Params) -> dict[str, Any]:
    """Nested dict -> {'a/b/c': leaf}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict[str, Any]) -> Params:
    """{'a/b/c': leaf} -> nested dict."""
    return traverse_util.unflatten_dict(flat, sep="/")


def split_frozen(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """What is trained of a network's parameters, and what is not: the leaves whose path one of the
    patterns is found in."""
    flat = flatten(params)
    kept = {path for path in flat if any(re.search(pattern, path) for pattern in patterns)}
    parts = ({k: v for k, v in flat.items() if (k in kept) == side} for side in (False, True))
    return tuple(unflatten(part) for part in parts)


def merge_params(params: Params, kept: Params | None) -> Params:
    """A network's parameters from what `split_frozen` parted; leaves of `params` come first."""
    return unflatten({**flatten(kept), **flatten(params)}) if kept else params


def cast(params: Params, dtype) -> Params:
    """Every floating leaf in `dtype`; of shapes alone, shapes."""

    def change(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        abstract = isinstance(x, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(x.shape, dtype) if abstract else x.astype(dtype)

    return jax.tree.map(change, params)
