"""Attention by Pallas kernels, on the mesh for which a program is traced."""

import math
from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from gadjax.ops import pallas_gpu, pallas_tpu
from gadjax.ops.dual_attention import kept, shared
from gadjax.ops.placement import SAMPLES, placed

MODULES = {"tpu": pallas_tpu, "gpu": pallas_gpu}


class Kernels(NamedTuple):
    """A module of kernels, and the mesh on whose devices they run."""

    module: ModuleType
    mesh: Mesh

    def spread(self, f, bias, *given):
        """f(bias, *given) of arrays [B, N, H, K] and [B, H, N], on every device for its own samples
        and heads: the compiler cannot cut a kernel."""
        heads = given[0].shape[2]
        split = "tensor" if heads % self.mesh.shape["tensor"] == 0 else None

        def place(x):
            return PartitionSpec(SAMPLES, *((None, split) if x.ndim == 4 else (split,)))

        def row(x):  # broadcasts to [B, H, N, M]
            batch, heads, *_ = x.shape
            return PartitionSpec(SAMPLES if batch > 1 else None, split if heads > 1 else None)

        inside = jax.tree.map(row, bias), *jax.tree.map(place, given)
        outside = jax.tree.map(place, jax.eval_shape(f, bias, *given))
        on_each = jax.shard_map(
            f, mesh=self.mesh, in_specs=inside, out_specs=outside, check_vma=False
        )
        return on_each(bias, *given)


def kernels_for(q, k, bias) -> Kernels | None:
    """Those that take these queries, keys and bias, where the program's devices have any."""
    place = placed.value
    if place is None or not place.kernels:
        return None
    shares = math.prod(place.mesh.shape[axis] for axis in SAMPLES)
    module = MODULES[place.kernels]
    if q.shape[0] % shares or not module.supported(q, k, bias):
        return None
    return Kernels(module, place.mesh)


def value_by(kernels: Kernels, q, k, v, bias):
    """Attention [B, N, H, K]; for reverse mode alone, once."""
    found = kernels.spread(lambda bias, q, k, v: kernels.module.value(q, k, v, bias), bias, q, k, v)
    return kept(found)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dual_by(kernels: Kernels, q, k, v, bias, tq, tk, tv):
    """`dual_attention` by kernels."""
    return _forward(kernels, q, k, v, bias, tq, tk, tv)[0]


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


def _forward(kernels, q, k, v, bias, tq, tk, tv):
    def run(bias, q, k, v, tq, tk, tv):
        return kernels.module.dual(q, k, v, bias, tq, tk, tv)

    @one_value
    def dual(operands, tangents):
        q, k, v, bias = operands
        return kernels.spread(run, bias, q, k, v, *tangents)

    saved = kept(dual((q, k, v, bias), (tq, tk, tv)))
    return tuple(x.astype(v.dtype) for x in saved[:2]), (q, k, v, bias, tq, tk, tv, saved)


def _backward(kernels, given, cotangents):
    def run(bias, *others):
        do, eo, q, k, v, *rest = others
        return kernels.module.dual_transpose(do, eo, q, k, v, bias, *rest)

    @shared
    def transpose(do, eo, q, k, v, bias, *rest):
        return kernels.spread(run, bias, do, eo, q, k, v, *rest)

    *operands, saved = given
    dq, dk, dv, *moving = transpose(*cotangents, *operands, *saved)
    return dq, dk, dv, None, *moving


dual_by.defvjp(_forward, _backward)
