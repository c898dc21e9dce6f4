"""Pallas attention kernels on the mesh that a program is traced for, and their validation."""

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
from gadjax.ops.shard_mapped import shard_mapped
from gadjax.ops.tiles import join_rounding, merge_heads, split_heads, split_rounding
from gadjax.parallel.placement import batch_shards, current_placement, sequence_shards
from gadjax.seeds import make_key

KERNEL_MODULES = {"tpu": pallas_tpu, "gpu": pallas_gpu}
MAX_ERROR = 0.05  # relative to the largest number: five times the rounding error of bfloat16
log = logging.getLogger(__name__)


class Kernels(NamedTuple):
    """Module of kernels, and the mesh on whose devices they run."""

    module: ModuleType
    mesh: Mesh


def kernels_for(q, k, bias) -> Kernels | None:
    """Kernels for these operands on the program's devices; None where there are none.

    Args:
      q, k: queries [B, N, H, K] and keys [B, M, H, K].
      bias: None, or an array that broadcasts to the logits [B, H, N, M].
    """
    placement = current_placement.value
    if placement is None or not placement.kernels:
        return None
    module, mesh = KERNEL_MODULES[placement.kernels], placement.mesh
    batch, positions, *rest = q.shape
    local_q = jax.ShapeDtypeStruct(
        (batch, positions // sequence_shards(mesh, positions), *rest), q.dtype
    )
    if batch % batch_shards(mesh) or not module.supported(local_q, k, bias):
        return None
    return Kernels(module, mesh)


def value_with_kernels(kernels: Kernels, q, k, v, bias):
    """Attention [B, N, H, K] by kernels; differentiable in reverse mode only, once.

    Args:
      kernels: of `kernels_for`.
      q, k, v, bias: as for `attention`.
    """

    def run(queries, keys, bias):
        return kernels.module.value(*queries, *keys, bias), ()

    return named_for_checkpoint(shard_mapped(run, kernels.mesh, (q,), (k, v), bias)[0])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dual_with_kernels(kernels: Kernels, q, k, v, bias, tq, tk, tv):
    """Dual attention by kernels; results as of `dual_attention`.

    Args:
      kernels: of `kernels_for`.
      q, k, v, bias, tq, tk, tv: as for `dual_attention`.
    """
    o, to, *_ = _dual(kernels, q, k, v, bias, tq, tk, tv)
    return o.astype(v.dtype), to.astype(v.dtype)


def vmappable_dual(f):
    """Keep the value unbatched where jax.vmap maps f(operands, tangents) -> (o, o., lse, mu) over
    tangents only; a kernel's own batching rule would batch all results."""
    vmappable = jax.custom_batching.custom_vmap(f)

    @vmappable.def_vmap
    def rule(size, batched, operands, tangents):
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        results = vmappable_dual(jax.vmap(f, axes))(operands, tangents)
        if any(jax.tree.leaves(batched[0])):
            return results, (True,) * 4
        o, to, lse, mu = results
        return (o[0], to, lse[0], mu), (False, True, False, True)

    return vmappable


def _dual(kernels, q, k, v, bias, tq, tk, tv):
    def run(queries, keys, bias):
        (q, tq), (k, v, tk, tv) = queries, keys
        return kernels.module.dual(q, k, v, bias, tq, tk, tv), ()

    @vmappable_dual
    def dual(operands, tangents):
        (q, k, v, bias), (tq, tk, tv) = operands, tangents
        return shard_mapped(run, kernels.mesh, (q, tq), (k, v, tk, tv), bias)[0]

    return dual((q, k, v, bias), (tq, tk, tv))


def _forward(kernels, q, k, v, bias, tq, tk, tv):
    o, to, *rows = _dual(kernels, q, k, v, bias, tq, tk, tv)
    results, rest = zip(split_rounding(o, v.dtype), split_rounding(to, v.dtype), strict=True)
    results, rest, rows = named_for_checkpoint((results, merge_heads(rest), rows))
    return results, (merge_heads((q, k, v, tq, tk, tv, *results)), bias, rest, rows)


def _backward(kernels, residuals, cotangents):
    def run(queries, keys, bias):
        (do, eo, q, tq, *saved), (k, v, tk, tv) = queries, keys
        results = kernels.module.dual_transpose(do, eo, q, k, v, bias, tq, tk, tv, *saved)
        dq, dk, dv, dtq, dtk, dtv = results
        return (dq, dtq), (dk, dv, dtk, dtv)

    @vmappable_transpose
    def transpose(do, eo, q, k, v, bias, tq, tk, tv, *saved):
        queries, keys = (do, eo, q, tq, *saved), (k, v, tk, tv)
        (dq, dtq), (dk, dv, dtk, dtv) = shard_mapped(run, kernels.mesh, queries, keys, bias)
        return dq, dk, dv, dtq, dtk, dtv

    merged, bias, rest, rows = residuals
    (q, k, v, tq, tk, tv, *outputs), rest = split_heads((merged, rest), cotangents[0].shape[2])
    outputs = map(join_rounding, outputs, rest)
    dq, dk, dv, *tangents = transpose(*cotangents, q, k, v, bias, tq, tk, tv, *outputs, *rows)
    return dq, dk, dv, None, *tangents


dual_with_kernels.defvjp(_forward, _backward, **DEFVJP_OPTIONS)


@cache
def kernels_validated(platform: str, dtype: str) -> bool:
    """Validate a platform's kernels on this process's device: True if they compile and agree with
    `dual_attention` and its transpose for `dtype`; otherwise False, with a warning in the log."""
    module, key = KERNEL_MODULES[platform], make_key(0)
    shapes = [(2, length, 1, 72) for length in (200, 150, 150, 200, 150, 150, 200, 200)]
    x = [jax.random.normal(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes)]
    bias = jnp.zeros((2, 1, 1, 150)).at[0, ..., 75:].set(-10_000.0)

    @jax.jit
    def expected(q, k, v, tq, tk, tv, do, eo):
        results, transpose = jax.vjp(dual_attention, q, k, v, bias, tq, tk, tv)
        dq, dk, dv, _, *tangents = transpose((do, eo))
        return *results, dq, dk, dv, *tangents

    @jax.jit
    def actual(q, k, v, tq, tk, tv, do, eo):
        results = module.dual(q, k, v, bias, tq, tk, tv)
        return *results[:2], *module.dual_transpose(do, eo, q, k, v, bias, tq, tk, tv, *results)

    try:
        x = [part.astype(dtype) for part in x]
        pairs = zip(actual(*x), expected(*(part.astype(jnp.float32) for part in x)), strict=True)
        error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    except Exception as reason:  # a compiler documents no exception type
        log.warning("attention: Pallas kernels disabled, as they do not compile: %s", reason)
        return False
    if not error <= MAX_ERROR:
        log.warning("attention: Pallas kernels disabled, as their relative error is %.2g", error)
    return error <= MAX_ERROR
