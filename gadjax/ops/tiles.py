"""Tile arithmetic of attention and its tangent, shared by the Pallas kernels for TPUs and GPUs.

A tile is a block of n queries against a block of m keys. Its operands are plain arrays; those of
tangents are None in a pass without tangents, and tk and tv also where the keys are constant:

    queries = q, tq             [n, K]    in reverse also do, eo: the cotangents of o and o.
    keys = k, v, tk, tv         [m, K]
    rows = lse, r, mu, s        [n, 1]    what reverse mode needs of a row's other keys

Names and formulas are those of `gadjax.ops.dual_attention`. Two things make them local to a tile.
Forward, the tangent is centred as it is summed: `add_tile` keeps mu = rowsum(P S.) of the keys so
far next to the maximum and sum of the online softmax, and corrects the sum when mu changes.
(Summing P S. v and subtracting mu o at the end loses digits where tangents are bfloat16 and mu is
large.) In reverse, rowsum(P G) = do . o + eo . o. - s mu with s = eo . o, so that

    eS = P (eP - s)     dS = P (G - rowsum(P G)) = P (dP + (eP - s)(S. - mu) - r)
    r = do . o + eo . o.
"""

from functools import partial

import jax
import jax.numpy as jnp

MASKED_LOGIT = -1e30  # of padding keys; finite, so that no difference is NaN


def key_bias(bias, keys: int, padded: int):
    """Bias over keys [B|1, H|1, 1, padded] in float32, MASKED_LOGIT for padding; or None.

    Its maximum is subtracted from each row, which does not change the softmax: logits near the
    -10000 of a fully masked prompt would keep only three decimals.

    Args:
      bias: None or [B|1, H|1, 1, keys].
      keys, padded: numbers of keys without and with padding.
    """
    if bias is None:
        if keys == padded:
            return None
        bias = jnp.zeros((1, 1, 1, keys), jnp.float32)
    bias = jnp.broadcast_to(bias.astype(jnp.float32), (*bias.shape[:3], keys))
    bias = jnp.maximum(bias - bias.max(-1, keepdims=True), MASKED_LOGIT)
    return jnp.pad(bias, [(0, 0)] * 3 + [(0, padded - keys)], constant_values=MASKED_LOGIT)


def merge_heads(tree):
    """Merge heads, [B, N, H, K] to [B, N, H K], to save residuals: on a TPU a head of 72 channels
    by itself is padded to 128.

    Behind an optimization barrier, or the compiler would save the kernels' operands instead.
    """
    return jax.lax.optimization_barrier(jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1), tree))


def split_heads(tree, heads: int):
    """Split merged heads again: the inverse of `merge_heads`."""
    return jax.tree.map(lambda x: x.reshape(*x.shape[:2], heads, -1), tree)


def split_rounding(x, dtype):
    """Split a float32 result x into x rounded to `dtype` and the rounding error (None where `dtype`
    is that of x).

    Reverse mode needs more precision than bfloat16 has; the two take no more memory than x, and the
    first is saved for reverse mode anyway.
    """
    if dtype == x.dtype:
        return x, None
    info = jnp.finfo(dtype)
    # Compilers may elide a conversion to bfloat16 and back.
    nearest = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    return nearest.astype(dtype), (x - nearest).astype(dtype)


def join_rounding(x, rest):
    """Add the rounding error back: the inverse of `split_rounding`, to twice the digits."""
    return x if rest is None else x.astype(jnp.float32) + rest


def row_sums(do, eo, o, to, lse, mu):
    """Row statistics (lse, r, mu, s) for reverse mode, each [B, H, N].

    Args:
      do, eo: cotangents of o and o., [B, N, H, K].
      o, to: attention and its tangent in float32, [B, N, H, K].
      lse, mu: of `finalize`, [B, H, N].
    """

    def row_dot(a, b):
        return (a.astype(jnp.float32) * b).sum(-1).transpose(0, 2, 1)

    if eo is None:
        return lse, row_dot(do, o), None, None
    return lse, row_dot(do, o) + row_dot(eo, to), mu, row_dot(eo, o)


def dot(a, b, dims=(1, 0)):
    """Matrix product accumulated in float32.

    Args:
      a, b: matrices.
      dims: the contracted dimensions of a and b.
    """
    return jax.lax.dot_general(
        a, b, (((dims[0],), (dims[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def queries_by_keys(a, b):
    """Product a b^T [n, m] of a [n, K] and b [m, K]."""
    return dot(a, b, (1, 1))


def keys_by_queries(a, b):
    """Transposed product b a^T [m, n] of a [n, K] and b [m, K]."""
    return dot(b, a, (1, 1))


def logits(queries, keys, bias, scale, product=queries_by_keys):
    """Logits S and their tangents S. (None without tangents) of a tile.

    Args:
      queries, keys: of the tile.
      bias: None, or an array that broadcasts to S.
      scale: 1 / sqrt(K) for the K without padding.
      product: `queries_by_keys`, or `keys_by_queries` for transposed tiles.
    """
    (q, tq, *_), (k, _, tk, _) = queries, keys
    s = product(q, k) * scale
    s = s if bias is None else s + bias
    if tq is None:
        return s, None
    ts = product(tq, k) if tk is None else product(tq, k) + product(q, tk)
    return s, ts * scale


def initial_state(rows: int, channels: int, tangent: bool):
    """Online-softmax state of `add_tile` before the first key.

    Args:
      rows: number n of queries.
      channels: number K of channels.
      tangent: whether tangents are summed too.
    """
    column, block = jnp.zeros((rows, 1), jnp.float32), jnp.zeros((rows, channels), jnp.float32)
    return (column + MASKED_LOGIT, column, block, *((column, block) if tangent else ()))


def add_tile(state, s, ts, v, tv):
    """Update the online softmax by one tile of keys.

    Args:
      state: the largest logit; the sums of e and e v, where e = exp(S - largest); and with tangents
        the mean mu of S. weighted by e, and the sum of e ((S. - mu) v + v.).
      s, ts: logits and their tangents [n, m].
      v, tv: values and their tangents [m, K].

    Returns: the new state.
    """
    largest, total, acc, *tangent = state
    top = jnp.maximum(largest, s.max(-1, keepdims=True))
    p, decay = jnp.exp(s - top), jnp.exp(largest - top)
    decayed, acc = decay * total, decay * acc
    total = decayed + p.sum(-1, keepdims=True)
    if tangent:
        mu, acc_tangent = tangent
        mean = (decayed * mu + (p * ts).sum(-1, keepdims=True)) / total
        acc_tangent = (
            decay * acc_tangent - (mean - mu) * acc + dot((p * (ts - mean)).astype(v.dtype), v)
        )
        tangent = mean, acc_tangent if tv is None else acc_tangent + dot(p.astype(v.dtype), tv)
    return top, total, acc + dot(p.astype(v.dtype), v), *tangent


def finalize(state):
    """Results (o, o.) and (lse, mu) of the final state; o. and mu are None without tangents."""
    largest, total, acc, *tangent = state
    mu, acc_tangent = tangent or (None, None)
    o = acc / total, None if acc_tangent is None else acc_tangent / total
    return o, (largest + jnp.log(total), mu)


def cotangents(queries, keys, bias, rows, scale, product):
    """Compute P, P., dS and eS of a tile; P. and eS are None without tangents.

    Args:
      queries, keys, bias, scale, product: as for `logits`.
      rows: row statistics (lse, r, mu, s), shaped to broadcast to the tile.
    """
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
    """Contribution of a tile to dq and dtq [n, K], each without the factor `scale`.

    Args:
      queries, keys, bias, rows, scale: as for `cotangents`.
    """
    k, _, tk, _ = keys
    _, _, ds, es = cotangents(queries, keys, bias, rows, scale, queries_by_keys)
    dq = dot(ds.astype(k.dtype), k)
    if es is None:
        return dq, None
    es = es.astype(k.dtype)
    return dq if tk is None else dq + dot(es, tk), dot(es, k)


def key_sums(queries, keys, bias, rows, scale):
    """Contribution of a transposed tile [m, n] to dk, dv, dtk and dtv [m, K].

    dk and dtk are without the factor `scale`; dtk and dtv are None for constant keys.

    Args:
      queries, keys, scale: as for `cotangents`.
      bias: None or [m, 1].
      rows: row statistics [1, n].
    """
    (q, tq, do, eo), tk = queries, keys[2]
    p, tp, ds, es = (
        x if x is None else x.astype(q.dtype)
        for x in cotangents(queries, keys, bias, rows, scale, keys_by_queries)
    )
    dk, dv = dot(ds, q), dot(p, do)
    if es is not None:
        dk, dv = dk + dot(es, tq), dv + dot(tp, eo)
    return dk, dv, *((None, None) if tk is None else (dot(es, q), dot(p, eo)))


def make_value_attention(forward, reverse):
    """Build value(q, k, v, bias=None, *, interpret=False), attention without tangent, from a
    backend's forward and reverse calls."""

    @partial(jax.custom_vjp, nondiff_argnums=(4,))
    def attend(q, k, v, bias, interpret):
        return attend_forward(q, k, v, bias, interpret)[0]

    def attend_forward(q, k, v, bias, interpret):
        (o, _), (lse, _) = forward((q, None), (k, v, None, None), bias, interpret)
        o, rest = split_rounding(o, v.dtype)
        return o, (merge_heads((q, k, v, o, rest)), bias, lse)

    def attend_reverse(interpret, saved, do):
        merged, bias, lse = saved
        q, k, v, *o = split_heads(merged, do.shape[2])
        rows = row_sums(do, None, join_rounding(*o), None, lse, None)
        queries, keys = (q, None, do, None), (k, v, None, None)
        (dq, _), (dk, dv, *_) = reverse(queries, keys, bias, rows, interpret)
        return dq, dk, dv, None

    attend.defvjp(attend_forward, attend_reverse)

    def value(q, k, v, bias=None, *, interpret=False):
        """Attention [B, N, H, K]; differentiable in reverse mode only, once, not in the bias."""
        return attend(q, k, v, bias, interpret)

    return value
