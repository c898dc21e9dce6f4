"""Softmax attention and its tangent at once, with a transpose written by hand.

With S = q k^T / sqrt(K) + bias, P = softmax(S) and a dot for a tangent:

    S. = (q. k^T + q k.^T) / sqrt(K)      mu = rowsum(P S.)      P. = P (S. - mu)
    o = P v                               o. = P. v + P v.

Nothing of size N x M is kept for the reverse pass, which computes S, P and S. again and is then,
for cotangents do of o and eo of o.:

    dP = do v^T + eo v.^T     eP = eo v^T           s = rowsum(eP P)      eS = P (eP - s)
    G = dP + eP (S. - mu) - s S.                    dS = P (G - rowsum(P G))
    dv = P^T do + P.^T eo     dv. = P^T eo          dq = dS k + eS k.     dq. = eS k
    dk = dS^T q + eS^T q.     dk. = eS^T q          (S. and all of the last four times 1 / sqrt(K))

Six products of size N x M x K forward and fifteen in reverse, where a value takes two and five:
2.1 to 2.3 times a value's gradient, where a central difference of two values takes 2.
"""

import math
from collections.abc import Callable
from functools import partial
from inspect import signature

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gadjax.ops.spread import sequence_mesh, spread

ATTENTION_CHECKPOINT = (
    "attention"  # as checkpoint policies call what reverse mode may keep of an attention
)
MAX_LOGITS = (
    2**19
)  # logits of one head that exist at once; more are computed a block of queries a time


def query_blocks(queries: int, keys: int, arrays: int = 1) -> int:
    """In how many blocks of queries an attention is computed that holds that many arrays of logits
    for every one that attention alone holds."""
    return min(queries, -(-arrays * queries * keys // MAX_LOGITS))


def over_query_blocks(f: Callable, queries: tuple, keys: tuple, bias, arrays: int = 1):
    """f(queries, keys, bias) with its first result [B, N, ...] from blocks, the others summed over
    them; every device has blocks of its own where a sample's queries are split over devices.

    queries: arrays [B, N, H, K], which are cut along N. keys: arrays [B, M, H, K]. bias: cut where
    it has N rows. f returns (a tree like the queries, a tree like the keys, to be summed). What
    plain reverse mode needs of one of several blocks it computes again.
    """
    run, mesh = partial(_in_blocks, f, arrays), sequence_mesh(queries[0])
    if mesh is None:
        return run(queries, keys, bias)
    return spread(run, mesh, queries, keys, bias)


def _in_blocks(f, arrays, queries, keys, bias):
    positions = queries[0].shape[1]
    count = query_blocks(positions, keys[0].shape[1], arrays)
    if count == 1:
        return f(queries, keys, bias)
    f = jax.checkpoint(f, prevent_cse=False)
    size = math.ceil(positions / count)

    def cut(x, axis):
        x = jnp.pad(x, [(0, count * size - positions if i == axis else 0) for i in range(x.ndim)])
        shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    parts = jax.tree.map(partial(cut, axis=1), queries)
    rows = None if bias is None or bias.shape[2] == 1 else cut(bias, 2)

    def one(part):
        queries, row = part
        return f(queries, keys, bias if row is None else row)

    def step(total, part):
        each, summed = one(part)
        return jax.tree.map(jnp.add, total, summed), each

    first = jax.tree.map(lambda x: x[0], (parts, rows))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda part: one(part)[1], first)
    )
    total, each = jax.lax.scan(step, zeros, (parts, rows))

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * size, *x.shape[3:])[:, :positions]

    return jax.tree.map(join, each), total


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum summed in at least float32, its first operand rounded to the second's dtype."""
    wide = jnp.promote_types(b.dtype, jnp.float32)
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=wide)


logits = partial(product, "bnhk,bmhk->bhnm")  # q k^T, without its scale
mix = partial(product, "bhnm,bmhk->bnhk")  # P v
unmix = partial(product, "bhnm,bnhk->bmhk")  # P^T x


def softmax(q, k, bias):
    """P [B, H, N, M]."""
    s = logits(q, k) * q.shape[-1] ** -0.5
    return jax.nn.softmax(s if bias is None else s + bias.astype(s.dtype), axis=-1)


def _moved(q, k, tq, tk):
    """S. [B, H, N, M]."""
    found = logits(tq, k) if tk is None else logits(tq, k) + logits(q, tk)
    return found * q.shape[-1] ** -0.5


def _rowsum(x):
    return x.sum(-1, keepdims=True)


@jax.custom_vjp
def dual_attention(q, k, v, bias, tq, tk, tv):
    """Attention and its tangent, (o, o.), each [B, N, H, K] in the dtype of the values.

    Args:
      q, tq: queries [B, N, H, K] and their tangents.
      k, v, tk, tv: keys and values [B, M, H, K] and their tangents; tk and tv may both be None,
        for keys that do not move (a text's), which saves two of six products.
      bias: None, or what broadcasts to the logits [B, H, N, M]; it takes no derivative.

    Reverse mode goes through both results once. The rule's own tangents are not defined: a third
    derivative, or forward mode over this, fails.
    """

    def block(queries, keys, bias):
        (q, tq), (k, v, tk, tv) = queries, keys
        p = softmax(q, k, bias)
        ts = _moved(q, k, tq, tk)
        o, to = mix(p, v), mix(p * (ts - _rowsum(p * ts)), v)
        to = to if tv is None else to + mix(p, tv)
        return (o.astype(v.dtype), to.astype(v.dtype)), ()

    return over_query_blocks(block, (q, tq), (k, v, tk, tv), bias, arrays=2)[0]


def named_for_checkpoint(results):
    """The results, by the name under which a checkpoint policy may keep them."""
    return jax.tree.map(lambda x: checkpoint_name(x, ATTENTION_CHECKPOINT), results)


def _forward(*given):
    return named_for_checkpoint(dual_attention(*given)), given


def vmappable_transpose(f: Callable) -> Callable:
    """f(do, *others), a transpose, for jax.vmap over directions that share one value.

    Then do is not batched, while what f returns for the operands of the value is, and
    jax.custom_vjp sums that over the batch: do's part of it would be counted once a direction.
    """
    fair = jax.custom_batching.custom_vmap(f)

    @fair.def_vmap
    def rule(size, batched, do, *others):
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        found = vmappable_transpose(jax.vmap(f, axes))(do if batched[0] else do / size, *others)
        return found, jax.tree.map(lambda _: True, found)

    return fair


@vmappable_transpose
def _transpose(do, eo, q, k, v, bias, tq, tk, tv):
    scale = q.shape[-1] ** -0.5

    def block(queries, keys, bias):
        (q, tq, do, eo), (k, v, tk, tv) = queries, keys
        p = softmax(q, k, bias)
        ts = _moved(q, k, tq, tk)
        centred = ts - _rowsum(p * ts)
        dp, ep = logits(do, v), logits(eo, v)
        dp = dp if tv is None else dp + logits(eo, tv)
        s = _rowsum(ep * p)
        es = p * (ep - s) * scale
        g = dp + ep * centred - s * ts
        ds = p * (g - _rowsum(p * g)) * scale
        dq, dtq = mix(ds, k), mix(es, k)
        dk = unmix(ds, q) + unmix(es, tq)
        dv = unmix(p, do) + unmix(p * centred, eo)
        if tk is not None:
            dq = dq + mix(es, tk)
        dtk, dtv = (None, None) if tk is None else (unmix(es, q), unmix(p, eo))
        return (dq.astype(q.dtype), dtq.astype(q.dtype)), (dk, dv, dtk, dtv)

    queries, keys = (q, tq, do, eo), (k, v, tk, tv)
    (dq, dtq), summed = over_query_blocks(block, queries, keys, bias, arrays=2)
    dk, dv, dtk, dtv = jax.tree.map(lambda x: x.astype(k.dtype), summed)
    return dq, dk, dv, dtq, dtk, dtv


def _backward(given, cotangents):
    dq, dk, dv, *moving = _transpose(*cotangents, *given)
    return dq, dk, dv, None, *moving


# Over directions that share one value: newer JAX hands its cotangent to the first of them, and
# refuses unless it is asked to; what is older hands it to all, which `shared` makes up for.
NEWER = "generic_batching" in signature(jax.custom_vjp.defvjp).parameters
DEFVJP_OPTIONS = {"generic_batching": True} if NEWER else {}
dual_attention.defvjp(_forward, _backward, **DEFVJP_OPTIONS)
