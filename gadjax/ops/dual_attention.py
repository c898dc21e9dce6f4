"""Dual attention: softmax attention and its tangent (JVP) together, with a custom transpose.

With S = q k^T / sqrt(K) + bias, P = softmax(S) and a trailing dot for a tangent:

    S. = (q. k^T + q k.^T) / sqrt(K)      mu = rowsum(P S.)      P. = P (S. - mu)
    o = P v                               o. = P. v + P v.

Nothing of size N x M is saved for the reverse pass, which recomputes S, P and S. and is, for
cotangents do of o and eo of o.:

    dP = do v^T + eo v.^T     eP = eo v^T - rowsum(P eo v^T)              eS = P eP
    G = dP + eP (S. - mu)     dS = P (G - rowsum(P G))
    dv = P^T do + P.^T eo     dv. = P^T eo          dq = dS k + eS k.     dq. = eS k
    dk = dS^T q + eS^T q.     dk. = eS^T q          (S. and all of the last four times 1 / sqrt(K))

Cost: six products of size N x M x K forward and fifteen in reverse, where a value takes two and
five: 2.1 to 2.3 times a value's gradient, where a central difference of two values takes 2.
"""

import math
from collections.abc import Callable
from functools import partial
from inspect import signature

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gadjax.ops.shard_mapped import is_on_cpu, sequence_mesh, shard_mapped

ATTENTION_CHECKPOINT = "attention"  # checkpoint name of attention's results, for remat policies
MAX_LOGITS = 2**19  # of one head at a time; more are computed in blocks of queries
CACHED_LOGITS = 2**17  # in place of MAX_LOGITS on a CPU, if one block is not enough


def query_blocks(queries: int, keys: int, arrays: int, most: int) -> int:
    """Number of blocks of queries that keep the logits below `most`.

    Args:
      queries, keys: numbers of positions.
      arrays: arrays of logits' size held for each one that attention alone holds.
      most: largest number of logits.
    """
    return min(queries, -(-arrays * queries * keys // most))


def over_query_blocks(f: Callable, queries: tuple, keys: tuple, bias, arrays: int = 1):
    """Evaluate f(queries, keys, bias) in blocks of queries, on every device for its own queries
    where the mesh splits them, and of one head at a time on a CPU.

    Several blocks are rematerialised in plain reverse mode.

    Args:
      f: function of queries [B, H, N, K] and keys [B, H, K, M], the layouts whose products a CPU
        computes without a transpose; returns (a tree like its queries, a tree like its keys that
        is summed over the blocks).
      queries: arrays [B, N, H, K], which are split along N.
      keys: arrays [B, M, H, K].
      bias: None, or an array that broadcasts to the logits; split where it has N rows.
      arrays: as for `query_blocks`.

    Returns: the results of f in the layouts of `queries` and `keys`, the first concatenated along
      N, the second summed.
    """
    mesh = sequence_mesh(queries[0])
    blocks = _one_by_one if is_on_cpu(mesh) else partial(_in_blocks, MAX_LOGITS)

    def run(queries, keys, bias):
        queries = jax.tree.map(lambda x: x.transpose(0, 2, 1, 3), queries)
        keys = jax.tree.map(lambda x: x.transpose(0, 2, 3, 1), keys)
        results, summed = blocks(f, arrays, queries, keys, bias)
        return (
            jax.tree.map(lambda x: x.transpose(0, 2, 1, 3), results),
            jax.tree.map(lambda x: x.transpose(0, 3, 1, 2), summed),
        )

    if mesh is None:
        return run(queries, keys, bias)
    return shard_mapped(run, mesh, queries, keys, bias)


def _one_by_one(f, arrays, queries, keys, bias):
    """Several blocks as blocks of one sample and head at a time, which stay in a core's cache."""
    *shape, positions, _ = queries[0].shape
    if query_blocks(positions, keys[0].shape[-1], arrays, MAX_LOGITS) == 1:
        return f(queries, keys, bias)
    axis = next((i for i, size in enumerate(shape) if size > 1), None)
    if axis is None:
        return _in_blocks(min(CACHED_LOGITS, MAX_LOGITS), f, 1, queries, keys, bias)
    split = bias is not None and bias.shape[axis] > 1

    def one(parts):
        queries, keys, row = jax.tree.map(lambda x: jnp.expand_dims(x, axis), parts)
        return _one_by_one(f, arrays, queries, keys, row if split else bias)

    parts = queries, keys, bias if split else None
    results = jax.lax.map(one, jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), parts))
    return jax.tree.map(lambda x: jnp.moveaxis(jnp.squeeze(x, axis + 1), 0, axis), results)


def _in_blocks(most, f, arrays, queries, keys, bias):
    positions = queries[0].shape[2]
    count = query_blocks(positions, keys[0].shape[3], arrays, most)
    if count == 1:
        return f(queries, keys, bias)
    f = jax.checkpoint(f, prevent_cse=False)
    size = math.ceil(positions / count)

    def split(x):
        x = jnp.pad(x, [(0, count * size - positions if i == 2 else 0) for i in range(4)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], count, size, x.shape[3]), 2, 0)

    parts = jax.tree.map(split, queries)
    rows = None if bias is None or bias.shape[2] == 1 else split(bias)

    def evaluate(part):
        queries, row = part
        return f(queries, keys, bias if row is None else row)

    def step(total, part):
        block_result, summed = evaluate(part)
        return jax.tree.map(jnp.add, total, summed), block_result

    first = jax.tree.map(lambda x: x[0], (parts, rows))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda part: evaluate(part)[1], first)
    )
    total, results = jax.lax.scan(step, zeros, (parts, rows))

    def join(x):
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], count * size, x.shape[4])[:, :, :positions]

    return jax.tree.map(join, results), total


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum accumulated in at least float32.

    Args:
      spec: as for jnp.einsum.
      a: first operand, which is cast to the dtype of b.
      b: second operand.
    """
    wide = jnp.promote_types(b.dtype, jnp.float32)
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=wide)


logits = partial(product, "bhnk,bhkm->bhnm")  # q k^T, without its scale
mix = partial(product, "bhnm,bhkm->bhnk")  # P v


def unmix(p, x):
    """Product P^T x [B, H, K, M]. A CPU is slow to transpose P, not x: so x comes first."""
    return product("bhnk,bhnm->bhkm", x, p.astype(x.dtype))


def softmax(q, k, bias):
    """Attention probabilities P [B, H, N, M].

    Args:
      q, k: queries [B, H, N, K] and keys [B, H, K, M].
      bias: None, or an array that broadcasts to P.
    """
    s = logits(q, k) * q.shape[-1] ** -0.5
    return jax.nn.softmax(s if bias is None else s + bias.astype(s.dtype), axis=-1)


def _logit_tangents(q, k, tq, tk):
    """Tangents S. of the logits, [B, H, N, M]."""
    ts = logits(tq, k) if tk is None else logits(tq, k) + logits(q, tk)
    return ts * q.shape[-1] ** -0.5


def _rowsum(x):
    return x.sum(-1, keepdims=True)


@jax.custom_vjp
def dual_attention(q, k, v, bias, tq, tk, tv):
    """Attention and its tangent (o, o.).

    Args:
      q, tq: queries [B, N, H, K] and their tangents.
      k, v, tk, tv: keys and values [B, M, H, K] and their tangents; tk and tv may both be None,
        for constant keys (of a prompt), which saves two of six products.
      bias: None, or an array that broadcasts to the logits [B, H, N, M]; it takes no derivative.

    Returns: o and o., each [B, N, H, K] in the dtype of the values. Both are differentiable in
      reverse mode, once: a third derivative, or forward mode over this, fails.
    """

    def block(queries, keys, bias):
        (q, tq), (k, v, tk, tv) = queries, keys
        p = softmax(q, k, bias)
        ts = _logit_tangents(q, k, tq, tk)
        o, to = mix(p, v), mix(p * (ts - _rowsum(p * ts)), v)
        to = to if tv is None else to + mix(p, tv)
        return (o.astype(v.dtype), to.astype(v.dtype)), ()

    return over_query_blocks(block, (q, tq), (k, v, tk, tv), bias, arrays=2)[0]


def named_for_checkpoint(results):
    """Name results for checkpoint policies, which may save them for reverse mode."""
    return jax.tree.map(lambda x: checkpoint_name(x, ATTENTION_CHECKPOINT), results)


def _forward(*operands):
    return named_for_checkpoint(dual_attention(*operands)), operands


def vmappable_transpose(f: Callable) -> Callable:
    """Make a transpose f(do, *others) correct under jax.vmap over directions that share one value.

    Then do is not batched, while the results of f for the operands of the value are, and
    jax.custom_vjp sums these over the batch: the contribution of do would count once a direction.
    """
    vmappable = jax.custom_batching.custom_vmap(f)

    @vmappable.def_vmap
    def rule(size, batched, do, *others):
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        results = vmappable_transpose(jax.vmap(f, axes))(do if batched[0] else do / size, *others)
        return results, jax.tree.map(lambda _: True, results)

    return vmappable


@vmappable_transpose
def _transpose(do, eo, q, k, v, bias, tq, tk, tv):
    scale = q.shape[-1] ** -0.5

    def block(queries, keys, bias):
        (q, tq, do, eo), (k, v, tk, tv) = queries, keys
        p = softmax(q, k, bias)
        ts = _logit_tangents(q, k, tq, tk)
        centred = ts - _rowsum(p * ts)
        dp, ep = logits(do, v), logits(eo, v)
        dp = dp if tv is None else dp + logits(eo, tv)
        ep = ep - _rowsum(p * ep)
        g = dp + ep * centred
        ds, es = p * (g - _rowsum(p * g)), p * ep
        dq, dtq = mix(ds, k), mix(es, k)
        dk = unmix(ds, q) + unmix(es, tq)
        dv = unmix(p, do) + unmix(p * centred, eo)
        if tk is not None:
            dq = dq + mix(es, tk)
        dtk, dtv = (None, None) if tk is None else (unmix(es, q) * scale, unmix(p, eo))
        dq, dtq = ((x * scale).astype(q.dtype) for x in (dq, dtq))
        return (dq, dtq), (dk * scale, dv, dtk, dtv)

    queries, keys = (q, tq, do, eo), (k, v, tk, tv)
    (dq, dtq), summed = over_query_blocks(block, queries, keys, bias, arrays=2)
    dk, dv, dtk, dtv = jax.tree.map(lambda x: x.astype(k.dtype), summed)
    return dq, dk, dv, dtq, dtk, dtv


def _backward(operands, cotangents):
    dq, dk, dv, *tangents = _transpose(*cotangents, *operands)
    return dq, dk, dv, None, *tangents


# Under vmap over directions that share one value, newer JAX passes its cotangent to the first of
# them, and raises without this option; older JAX passes it to all, which `vmappable_transpose`
# corrects.
_HAS_OPTION = "generic_batching" in signature(jax.custom_vjp.defvjp).parameters
DEFVJP_OPTIONS = {"generic_batching": True} if _HAS_OPTION else {}
dual_attention.defvjp(_forward, _backward, **DEFVJP_OPTIONS)
