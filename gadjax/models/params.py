"""Parameters as nested dicts: flatten, split and merge, cast."""

import re
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from gadjax.ops.linear import Adapter, LowRank, is_quantized
from gadjax.types import Params


def flatten(params: Params) -> dict[str, Any]:
    """Flatten a nested dict to {'a/b/c': leaf}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict[str, Any]) -> Params:
    """Nested dict of {'a/b/c': leaf}."""
    return traverse_util.unflatten_dict(flat, sep="/")


def split_frozen(
    params: Params, patterns: Sequence[str], trained: Collection[str] = ()
) -> tuple[Params, Params]:
    """Split parameters into (trained, untrained).

    A pattern is a regex that matches anywhere in a path such as "blocks/attn/kernel".

    Args:
      params: of a network.
      patterns: of untrained parameters: those whose path matches one.
      trained: of trained ones: those whose path does not match all of these are untrained too.
    """
    flat = flatten(params)
    untrained = {
        path
        for path in flat
        if any(re.search(pattern, path) for pattern in patterns)
        or not all(re.search(pattern, path) for pattern in trained)
    }
    halves = (
        {k: v for k, v in flat.items() if (k in untrained) == frozen} for frozen in (False, True)
    )
    return tuple(unflatten(half) for half in halves)


def merge_params(params: Params, untrained: Params | None) -> Params:
    """Merge what `split_frozen` split; where both have a leaf, the one of `params` is taken.

    An adapter in `params` is put on the untrained kernel at its path.
    """
    if not untrained:
        return params
    flat = flatten(untrained)
    for path, leaf in flatten(params).items():
        flat[path] = LowRank(flat[path], leaf) if isinstance(leaf, Adapter) else leaf
    return unflatten(flat)


def cast(params: Params, dtype) -> Params:
    """Cast every floating-point leaf to `dtype`; abstract leaves stay abstract, 8-bit kernels as
    they are."""

    def convert(x):
        if is_quantized(x) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        abstract = isinstance(x, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(x.shape, dtype) if abstract else x.astype(dtype)

    return jax.tree.map(convert, params, is_leaf=is_quantized)
