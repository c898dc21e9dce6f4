"""Attention by Pallas kernels, on the mesh for which a program is traced."""

import logging
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gadjax.ops import pallas_gpu, pallas_tpu
from gadjax.ops.dual_attention import (
    DEFVJP_OPTIONS,
    dual_attention,
    named_for_checkpoint,
    vmappable_transpose,
)
from gadjax.ops.spread import spread
from gadjax.ops.tiles import join_rounding, merge_heads, split_heads, split_rounding
from gadjax.parallel.placement import batch_shards, current_placement, sequence_shards
from gadjax.seeds import make_key

KERNEL_MODULES = {"tpu": pallas_tpu, "gpu": pallas_gpu}
CLOSE = 0.05  # of the largest number: five times what rounding to bfloat16 comes to
log = logging.getLogger(__name__)


class Kernels(NamedTuple):
    """A module of kernels, and the mesh on whose devices they run."""

    module: ModuleType
    mesh: Mesh


def kernels_for(q, k, bias) -> Kernels | None:
    """Those that take these queries, keys and bias, where the program's devices have any."""
    place = current_placement.value
    if place is None or not place.kernels:
        return None
    module, mesh = KERNEL_MODULES[place.kernels], place.mesh
    batch, positions, *rest = q.shape
    part = jax.ShapeDtypeStruct(
        (batch, positions // sequence_shards(mesh, positions), *rest), q.dtype
    )
    if batch % batch_shards(mesh) or not module.supported(part, k, bias):
        return None
    return Kernels(module, mesh)


def value_with_kernels(kernels: Kernels, q, k, v, bias):
    """Attention [B, N, H, K]; for reverse mode alone, once."""

    def run(queries, keys, bias):
        return kernels.module.value(*queries, *keys, bias), ()

    return named_for_checkpoint(spread(run, kernels.mesh, (q,), (k, v), bias)[0])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dual_with_kernels(kernels: Kernels, q, k, v, bias, tq, tk, tv):
    """`dual_attention` by kernels."""
    o, to, *_ = _dual(kernels, q, k, v, bias, tq, tk, tv)
    return o.astype(v.dtype), to.astype(v.dtype)


def one_value(f):
    """f(operands, tangents) -> (o, o., lse, mu) for jax.vmap over tangents that share one value,
    which then is not batched either; a kernel's own rule would batch whatever it returns."""
    fair = jax.custom_batching.custom_vmap(f)

    @fair.def_vmap
    def rule(size, batched, operands, tangents):
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        found = one_value(jax.vmap(f, axes))(operands, tangents)
        if any(jax.tree.leaves(batched[0])):
            return found, (True,) * 4
        o, to, lse, mu = found
        return (o[0], to, lse[0], mu), (False, True, False, True)

    return fair


def _dual(kernels, q, k, v, bias, tq, tk, tv):
    def run(queries, keys, bias):
        (q, tq), (k, v, tk, tv) = queries, keys
        return kernels.module.dual(q, k, v, bias, tq, tk, tv), ()

    @one_value
    def dual(operands, tangents):
        (q, k, v, bias), (tq, tk, tv) = operands, tangents
        return spread(run, kernels.mesh, (q, tq), (k, v, tk, tv), bias)[0]

    return dual((q, k, v, bias), (tq, tk, tv))


def _forward(kernels, q, k, v, bias, tq, tk, tv):
    o, to, *rows = _dual(kernels, q, k, v, bias, tq, tk, tv)
    results, rest = zip(split_rounding(o, v.dtype), split_rounding(to, v.dtype), strict=True)
    results, rest, rows = named_for_checkpoint((results, merge_heads(rest), rows))
    return results, (merge_heads((q, k, v, tq, tk, tv, *results)), bias, rest, rows)


def _backward(kernels, given, cotangents):
    def run(queries, keys, bias):
        (do, eo, q, tq, *saved), (k, v, tk, tv) = queries, keys
        found = kernels.module.dual_transpose(do, eo, q, k, v, bias, tq, tk, tv, *saved)
        dq, dk, dv, dtq, dtk, dtv = found
        return (dq, dtq), (dk, dv, dtk, dtv)

    @vmappable_transpose
    def transpose(do, eo, q, k, v, bias, tq, tk, tv, *saved):
        queries, keys = (do, eo, q, tq, *saved), (k, v, tk, tv)
        (dq, dtq), (dk, dv, dtk, dtv) = spread(run, kernels.mesh, queries, keys, bias)
        return dq, dk, dv, dtq, dtk, dtv

    waiting, bias, rest, rows = given
    (q, k, v, tq, tk, tv, *found), rest = split_heads((waiting, rest), cotangents[0].shape[2])
    found = map(join_rounding, found, rest)
    dq, dk, dv, *moving = transpose(*cotangents, q, k, v, bias, tq, tk, tv, *found, *rows)
    return dq, dk, dv, None, *moving


dual_with_kernels.defvjp(_forward, _backward, **DEFVJP_OPTIONS)


@cache
def kernels_validated(platform: str, dtype: str) -> bool:
    """Whether a platform's kernels compile for the device of this process and give what the op in
    blocks gives, for an attention of `dtype` and its transpose. Says so where they do not."""
    module, key = KERNEL_MODULES[platform], make_key(0)
    shapes = [(2, length, 1, 72) for length in (200, 150, 150, 200, 150, 150, 200, 200)]
    x = [jax.random.normal(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes)]
    bias = jnp.zeros((2, 1, 1, 150)).at[0, ..., 75:].set(-10_000.0)

    @jax.jit
    def wanted(q, k, v, tq, tk, tv, do, eo):
        found, transpose = jax.vjp(dual_attention, q, k, v, bias, tq, tk, tv)
        dq, dk, dv, _, *moving = transpose((do, eo))
        return *found, dq, dk, dv, *moving

    @jax.jit
    def given(q, k, v, tq, tk, tv, do, eo):
        found = module.dual(q, k, v, bias, tq, tk, tv)
        return *found[:2], *module.dual_transpose(do, eo, q, k, v, bias, tq, tk, tv, *found)

    try:
        x = [part.astype(dtype) for part in x]
        pairs = zip(given(*x), wanted(*(part.astype(jnp.float32) for part in x)), strict=True)
        off = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    except Exception as error:  # whatever a compiler says
        log.warning("attention: no kernels here, as they do not compile: %s", error)
        return False
    if not off <= CLOSE:
        log.warning("attention: no kernels here, as they are off by %.2g", off)
    return off <= CLOSE
