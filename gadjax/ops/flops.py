"""FLOP counting from a program's jaxpr, without compiling or running it."""

import math
from collections.abc import Callable

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def flops(f: Callable, *args) -> float:
    """FLOPs of the matrix products and convolutions in f(*args).

    A scan counts its body times its length, a loop of unknown length once, a branch by its most
    expensive case. Dead code is counted here, though the compiler removes it.

    args: arrays or jax.ShapeDtypeStruct.
    """
    return jaxpr_flops(jax.make_jaxpr(f)(*args).jaxpr)


def jaxpr_flops(jaxpr: Jaxpr) -> float:
    """FLOPs of a traced program: a shard_map counts on every device of its mesh, a Pallas kernel
    once for every point of its grid."""
    return sum(_cost(eqn) for eqn in jaxpr.eqns)


def _cost(eqn) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        (over, _), _ = eqn.params["dimension_numbers"]
        shared = math.prod(eqn.invars[0].aval.shape[i] for i in over)
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * shared
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / outputs
    inner = [jaxpr_flops(jaxpr) for value in eqn.params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * _repetitions(name, eqn.params)


def _repetitions(name: str, params: dict) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return params["mesh"].size
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _jaxprs(value):
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _jaxprs(part)
    elif (traced := getattr(value, "traced", None)) is not None:  # newer JAX's custom_vjp
        yield from _jaxprs(traced.jaxpr)
