"""Backbones of fewer layers: some of a network's stacked blocks, with its other parameters."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gadjax.errors import InputError, short_repr
from gadjax.models.params import flatten, unflatten
from gadjax.types import Params

STACK = "blocks/"  # path of the stacked blocks, whose leaves have the layers first
COUNT = "num_layers"  # the option of config.json


def keep_layers(params: Params, layers: Sequence[int]) -> Params:
    """Parameters with these of the stacked blocks, in this order; () keeps all.

    Args:
      params: arrays or shapes of a backbone.
      layers: numbers of blocks from 0.
    """
    if not layers:
        return params

    def choose(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(layers), *leaf.shape[1:]), leaf.dtype)
        return leaf[np.asarray(layers)]

    flat = flatten(params)
    return unflatten({k: choose(v) if k.startswith(STACK) else v for k, v in flat.items()})


def check_layers(layers: Sequence[int], spec: Any, abstract: Params) -> None:
    """Check a student's layers.

    Args:
      layers: numbers of the teacher's blocks that the student keeps, or () for all.
      spec: the family's Config.
      abstract: shapes of the teacher's parameters.

    Raises: InputError for anything but rising block numbers, fewer than the teacher has, and for a
      family whose blocks are not one stack of equal ones.
    """
    if not layers:
        return
    sizes = {v.shape[0] for k, v in flatten(abstract).items() if k.startswith(STACK)}
    count = getattr(spec, COUNT, None)
    if sizes != {count}:
        raise InputError(
            f"student.layers: found {short_repr(tuple(layers))} for a backbone whose blocks are "
            "not one stack of equal ones; expected () or a PixArt or SANA"
        )
    numbers = all(type(layer) is int and 0 <= layer < count for layer in layers)
    if not numbers or list(layers) != sorted(set(layers)) or len(layers) == count:
        raise InputError(
            f"student.layers: found {short_repr(tuple(layers))}; expected rising numbers of some "
            f"of the teacher's {count} blocks, from 0, or () for all"
        )
