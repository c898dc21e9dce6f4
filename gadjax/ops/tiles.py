"""Attention and its tangent a tile at a time: what the kernels for TPUs and GPUs share.

A tile is a block of n queries against a block of m keys. Its operands are plain arrays, those of
a pass without tangents None, and tk and tv also where the keys do not move:

    queries = q, tq             [n, K]    in reverse also do, eo: the cotangents of o and o.
    keys = k, v, tk, tv         [m, K]
    rows = lse, r, mu, s        [n, 1]    what reverse mode has to know of a row's other keys

Names and formulas are those of `gadjax.ops.dual_attention`. Two things make them local to a tile.
Forward, the tangent is centred as it is summed: `add_tile` keeps mu = rowsum(P S.) of the keys so
far beside the softmax's largest logit and sum, and corrects the sum when mu changes. (Summing
P S. v and taking mu o off at the end loses digits where tangents are of bfloat16 and mu is large.)
In reverse, rowsum(P G) = do . o + eo . o. - s mu with s = eo . o, so that

    eS = P (eP - s)     dS = P (G - rowsum(P G)) = P (dP + (eP - s)(S. - mu) - r)
    r = do . o + eo . o.
"""

from functools import partial

import jax
import jax.numpy as jnp

LOW = -1e30  # the logit of a key that is not there; finite, so that no difference is nan


def key_bias(bias, keys: int, padded: int):
    """A bias over keys [B|1, H|1, 1, padded] in float32, LOW for keys past the last; or None.

    Its largest value is taken off each row, which no softmax notices: logits near the -10000 of a
    prompt that is masked throughout would keep three digits after the point.
    """
    if bias is None:
        if keys == padded:
            return None
        bias = jnp.zeros((1, 1, 1, keys), jnp.float32)
    bias = jnp.broadcast_to(bias.astype(jnp.float32), (*bias.shape[:3], keys))
    bias = jnp.maximum(bias - bias.max(-1, keepdims=True), LOW)
    return jnp.pad(bias, [(0, 0)] * 3 + [(0, padded - keys)], constant_values=LOW)


def merge_heads(tree):
    """Arrays [B, N, H, K] as [B, N, H K], in which they wait for reverse mode: on a TPU a head of
    72 numbers by itself takes the room of 128.

    Behind a barrier, or the compiler would keep what the kernels were given in place of these.
    """
    return jax.lax.optimization_barrier(jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1), tree))


def split_heads(tree, heads: int):
    """Inverse of `joined`."""
    return jax.tree.map(lambda x: x.reshape(*x.shape[:2], heads, -1), tree)


def split_rounding(x, dtype):
    """A result x, of float32, in `dtype`, and what rounding took off; None where it took nothing.

    Reverse mode needs more of a result than bfloat16 has; the two are no larger than x, and the
    first waits for reverse mode anyway.
    """
    if dtype == x.dtype:
        return x, None
    kind = jnp.finfo(dtype)
    # A mere conversion and back is something that compilers may leave out.
    near = jax.lax.reduce_precision(x, kind.nexp, kind.nmant)
    return near.astype(dtype), (x - near).astype(dtype)


def join_rounding(x, rest):
    """Inverse of `rounded`, to twice the digits of its parts."""
    return x if rest is None else x.astype(jnp.float32) + rest


def row_sums(do, eo, o, to, lse, mu):
    """rows = lse, r, mu, s, each [B, H, N]; o and to in float32."""

    def along(a, b):
        return (a.astype(jnp.float32) * b).sum(-1).transpose(0, 2, 1)

    if eo is None:
        return lse, along(do, o), None, None
    return lse, along(do, o) + along(eo, to), mu, along(eo, o)


def dot(a, b, dims=(1, 0)):
    """The product that sums over these dimensions of a and b, in float32."""
    return jax.lax.dot_general(
        a, b, (((dims[0],), (dims[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def queries_down(a, b):
    """a b^T [n, m] of a [n, K] and b [m, K]."""
    return dot(a, b, (1, 1))


def keys_down(a, b):
    """b a^T [m, n]."""
    return dot(b, a, (1, 1))


def logits(queries, keys, bias, scale, product=queries_down):
    """S and S., either way up; bias None or what fits; scale 1 / sqrt(K) for the K not padded."""
    (q, tq, *_), (k, _, tk, _) = queries, keys
    s = product(q, k) * scale
    s = s if bias is None else s + bias
    if tq is None:
        return s, None
    ts = product(tq, k) if tk is None else product(tq, k) + product(q, tk)
    return s, ts * scale


def initial_state(rows: int, channels: int, tangent: bool):
    """The state of `add_tile` before the first key."""
    column, block = jnp.zeros((rows, 1), jnp.float32), jnp.zeros((rows, channels), jnp.float32)
    return (column + LOW, column, block, *((column, block) if tangent else ()))


def add_tile(state, s, ts, v, tv):
    """The state after a tile.

    Its parts: the largest logit; the sums of e and e v, where e is exp(S - largest); and with
    tangents the mean mu of S. weighted by e, and the sum of e ((S. - mu) v + v.).
    """
    largest, total, acc, *tangent = state
    top = jnp.maximum(largest, s.max(-1, keepdims=True))
    p, keep = jnp.exp(s - top), jnp.exp(largest - top)
    kept, acc = keep * total, keep * acc
    total = kept + p.sum(-1, keepdims=True)
    if tangent:
        mu, moved = tangent
        mean = (kept * mu + (p * ts).sum(-1, keepdims=True)) / total
        moved = keep * moved - (mean - mu) * acc + dot((p * (ts - mean)).astype(v.dtype), v)
        tangent = mean, moved if tv is None else moved + dot(p.astype(v.dtype), tv)
    return top, total, acc + dot(p.astype(v.dtype), v), *tangent


def finalize(state):
    """(o, o.) and (lse, mu), the second of each None without tangents."""
    largest, total, acc, *tangent = state
    mu, moved = tangent or (None, None)
    o = acc / total, None if moved is None else moved / total
    return o, (largest + jnp.log(total), mu)


def cotangents(queries, keys, bias, rows, scale, product):
    """P, P., dS and eS of a tile, either way up; P. and eS None without tangents."""
    (_, _, do, eo), (_, v, _, tv), (lse, r, *more) = queries, keys, rows
    logit, ts = logits(queries, keys, bias, scale, product)
    p, dp = jnp.exp(logit - lse), product(do, v)
    if ts is None:
        return p, None, p * (dp - r), None
    mu, s = more
    dp = dp if tv is None else dp + product(eo, tv)
    centred, ep = ts - mu, product(eo, v) - s
    return p, p * centred, p * (dp - r + ep * centred), p * ep


def query_sums(queries, keys, bias, rows, scale):
    """What a tile adds to dq and dtq [n, K], each without the factor scale."""
    k, _, tk, _ = keys
    _, _, ds, es = cotangents(queries, keys, bias, rows, scale, queries_down)
    dq = dot(ds.astype(k.dtype), k)
    if es is None:
        return dq, None
    es = es.astype(k.dtype)
    return dq if tk is None else dq + dot(es, tk), dot(es, k)


def key_sums(queries, keys, bias, rows, scale):
    """What a tile, keys down (bias [m, 1], rows [1, n]), adds to dk, dv, dtk, dtv [m, K].

    dk and dtk are without the factor scale; dtk and dtv None where keys do not move.
    """
    (q, tq, do, eo), tk = queries, keys[2]
    p, tp, ds, es = (
        x if x is None else x.astype(q.dtype)
        for x in cotangents(queries, keys, bias, rows, scale, keys_down)
    )
    dk, dv = dot(ds, q), dot(p, do)
    if es is not None:
        dk, dv = dk + dot(es, tq), dv + dot(tp, eo)
    return dk, dv, *((None, None) if tk is None else (dot(es, q), dot(p, eo)))


def make_value_attention(forward, reverse):
    """value(q, k, v, bias=None, *, interpret=False), attention alone, of a backend's two calls."""

    @partial(jax.custom_vjp, nondiff_argnums=(4,))
    def attend(q, k, v, bias, interpret):
        return attend_forward(q, k, v, bias, interpret)[0]

    def attend_forward(q, k, v, bias, interpret):
        (o, _), (lse, _) = forward((q, None), (k, v, None, None), bias, interpret)
        o, rest = split_rounding(o, v.dtype)
        return o, (merge_heads((q, k, v, o, rest)), bias, lse)

    def attend_reverse(interpret, saved, do):
        waiting, bias, lse = saved
        q, k, v, *o = split_heads(waiting, do.shape[2])
        rows = row_sums(do, None, join_rounding(*o), None, lse, None)
        queries, keys = (q, None, do, None), (k, v, None, None)
        (dq, _), (dk, dv, *_) = reverse(queries, keys, bias, rows, interpret)
        return dq, dk, dv, None

    attend.defvjp(attend_forward, attend_reverse)

    def value(q, k, v, bias=None, *, interpret=False):
        """Attention [B, N, H, K]; reverse mode only, once. The bias takes no derivative."""
        return attend(q, k, v, bias, interpret)

    return value
