"""Attention and its tangent at once in Pallas kernels for TPUs; see `gadjax.ops.dual_attention`.

`dual` and its transpose compute what the jnp op computes, without anything of size N x M in HBM;
`value` is attention alone, of the same kernels. Three of them: forward, which sums over blocks of
keys; and in reverse one that sums over blocks of keys, for dq and dtq, and one that sums over
blocks of queries, with its tiles transposed, for dk, dv, dtk and dtv. A tile takes 6 products of
n x m x K forward and 9 + 12 in reverse, where the jnp op, which sums everything at once, takes 15.

Positions lie along the lanes, as [B, H, K, N], and a block is turned once it is in VMEM: with the K
of a head along them, 64 or 72 numbers take the room, in HBM, and the way there, of 128.

VMEM: a block is of at most 512 positions, turned of 512 bytes each, 256 KiB. In reverse eight
operands and up to four results come and go in blocks, each twice, because the next is copied while
one is computed; four sums in float32, 1 MiB; tiles of logits in float32 are of 1 MiB, of which the
compiler keeps about five at once. It grants a kernel 16 MiB on v5e, and compiles these for bfloat16
within 6 where K <= 72, within 8 where it is 128. Nothing grows with N or M.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gadjax.ops import tiles

LANES = 128


def supported(q, k, bias) -> bool:
    """Whether the kernels take these queries, keys and bias, and shorten anything.

    Fewer positions are padded to a tile more than they are computed.
    """
    return (
        q.dtype == k.dtype
        and q.dtype in (jnp.bfloat16, jnp.float32)
        and (bias is None or bias.shape[2] == 1)
        and q.shape[1] >= 2 * LANES
        and k.shape[1] >= LANES // 2
        and q.shape[3] <= 2 * LANES
    )


def dual(q, k, v, bias, tq, tk, tv, *, interpret=False):
    """(o, o., lse, mu), the first two [B, N, H, K], the last two [B, H, N], all in float32.

    Args:
      q, tq: queries and their tangents [B, N, H, K].
      k, v, tk, tv: keys and values [B, M, H, K]; tk and tv both None for keys that do not move.
      bias: None or [B|1, H|1, 1, M]. lse is that of logits to which it is added less its largest.

    All four are what `dual_transpose` has to be given. Rounded to bfloat16, o and o. would cost it
    a digit where keys or values have a part in common: all keys' differences are taken from them.
    """
    (o, to), (lse, mu) = _forward((q, tq), (k, v, tk, tv), bias, interpret)
    return o, to, lse, mu


def dual_transpose(do, eo, q, k, v, bias, tq, tk, tv, o, to, lse, mu, *, interpret=False):
    """(dq, dk, dv, dtq, dtk, dtv) for the cotangents do of o and eo of o..

    do, eo: [B, N, H, K] in the dtype of q. The others as given to `dual` and returned by it.
    Results are in the dtype of q and k; dtk and dtv None where tk and tv are.
    """
    rows = tiles.row_sums(do, eo, o, to, lse, mu)
    (dq, dtq), (dk, dv, dtk, dtv) = _reverse((q, tq, do, eo), (k, v, tk, tv), bias, rows, interpret)
    return dq, dk, dv, dtq, dtk, dtv


def block(positions: int, x) -> int:
    """The block of positions, of at most 512 of 512 bytes each, that pads them least.

    x: an operand [..., K].
    """
    wide = -(-x.shape[-1] // LANES) * LANES * x.dtype.itemsize > 512
    largest = 256 if wide else 512
    if positions <= largest:
        return -(-positions // LANES) * LANES
    sizes = largest, largest - LANES, largest // 2
    return min(sizes, key=lambda size: -(-positions // size) * size)


def _heads_first(x, size):
    """[B, N, H, K] as [B, H, K, N], N padded to a multiple of a block."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)]).transpose(0, 2, 3, 1)


def _heads_last(x, positions):
    return x.transpose(0, 3, 1, 2)[:, :positions]


def _like(tree, dtype=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)


def _along(size, axis, x):
    """Blocks [R, size] of x [B|1, H|1, R, N], along N by this axis of the grid."""
    batch, heads, rows, _ = x.shape
    return pl.BlockSpec(
        (None, None, rows, size),
        lambda *i: (0 if batch == 1 else i[0], 0 if heads == 1 else i[1], 0, i[axis]),
    )


def _call(kernel, grid, operands, results, sums, interpret):
    """kernel(*operands, *results, *sums): trees of arrays and shapes, each with its
    `_along`, and the shapes of what the last axis of the grid sums."""
    specs = [jax.tree.map(spec, tree) for tree, spec in (*operands, *results)]
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=specs[: len(operands)],
        out_specs=specs[len(operands) :],
        out_shape=[tree for tree, _ in results],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )(*(tree for tree, _ in operands))


def _prepared(queries, keys, bias):
    """Operands as the kernels take them, the blocks' sizes and how many there are."""
    n, m = (block(x.shape[1], x) for x in (queries[0], keys[0]))
    bias = tiles.key_bias(bias, keys[0].shape[1], -(-keys[0].shape[1] // m) * m)
    queries = jax.tree.map(partial(_heads_first, size=n), queries)
    keys = jax.tree.map(partial(_heads_first, size=m), keys)
    return queries, keys, bias, (n, m), (queries[0].shape[3] // n, keys[0].shape[3] // m)


def _forward(queries, keys, bias, interpret):
    """(o, o.) and (lse, mu), the second of each None where queries are (q, None)."""
    positions, tangent = queries[0].shape[1], queries[1] is not None
    queries, keys, bias, (n, m), steps = _prepared(queries, keys, bias)
    batch, heads, channels, padded = queries[0].shape
    down, along = partial(_along, n, 2), partial(_along, m, 3)
    out = _like(queries, jnp.float32)
    rows = jax.ShapeDtypeStruct((batch, heads, 1 + tangent, padded), jnp.float32)
    out, rows = _call(
        _forward_kernel,
        (batch, heads, *steps),
        ((queries, down), (keys, along), (bias, along)),
        ((out, down), (rows, down)),
        jax.eval_shape(lambda: tiles.initial_state(n, channels, tangent)),
        interpret,
    )
    rows = rows[..., :positions]
    out = jax.tree.map(partial(_heads_last, positions=positions), out)
    return out, (rows[:, :, 0], rows[:, :, 1] if tangent else None)


def _reverse(queries, keys, bias, rows, interpret):
    """(dq, dtq) and (dk, dv, dtk, dtv) of queries = (q, tq, do, eo); None where an operand is."""
    many, some = queries[0].shape[1], keys[0].shape[1]
    queries, keys, bias, (n, m), (down, along) = _prepared(queries, keys, bias)
    batch, heads, channels, padded = queries[0].shape
    rows = jnp.stack([x for x in rows if x is not None], axis=2)
    rows = jnp.pad(rows, [(0, 0)] * 3 + [(0, padded - many)])

    def sums(kernel, grid, size, results, query, key):
        """The sums for results, of the shapes of these operands, cut into blocks of this size."""
        return _call(
            kernel,
            (batch, heads, *grid),
            (
                (queries, partial(_along, n, query)),
                (keys, partial(_along, m, key)),
                (bias, partial(_along, m, key)),
                (rows, partial(_along, n, query)),
            ),
            ((_like(results), partial(_along, size, 2)),),
            [jax.ShapeDtypeStruct((size, channels), jnp.float32)] * len(jax.tree.leaves(results)),
            interpret,
        )[0]

    dq = sums(_query_kernel, (down, along), n, queries[:2], 2, 3)
    dk = sums(_key_kernel, (along, down), m, keys, 3, 2)
    return (
        jax.tree.map(partial(_heads_last, positions=many), dq),
        jax.tree.map(partial(_heads_last, positions=some), dk),
    )


def _read(refs):
    return jax.tree.map(lambda ref: ref[...], refs)


def _turned(values):
    return jax.tree.map(lambda x: x[...].T, values)


def _write(refs, values):
    for ref, x in zip(jax.tree.leaves(refs), jax.tree.leaves(values), strict=True):
        ref[...] = x.astype(ref.dtype)


def _forward_kernel(queries, keys, bias, out, rows, *state):
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        _write(state, tiles.initial_state(*queries[0].shape[::-1], queries[1] is not None))

    keys = _turned(keys)
    s, ts = tiles.logits(_turned(queries), keys, _read(bias), queries[0].shape[0] ** -0.5)
    _write(state, tiles.add_tile(_read(state), s, ts, keys[1], keys[3]))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        found, columns = tiles.finalize(_read(state))
        _write(out, _turned(found))
        rows[...] = jnp.concatenate(jax.tree.leaves(columns), axis=1).T


def _query_kernel(queries, keys, bias, rows, out, *sums):
    rows = rows[...].T
    rows = [rows[:, i : i + 1] for i in range(rows.shape[1])]
    scale = queries[0].shape[0] ** -0.5
    found = tiles.query_sums(_turned(queries), _turned(keys), _read(bias), rows, scale)
    _accumulate(sums, found, out, (scale, scale))


def _key_kernel(queries, keys, bias, rows, out, *sums):
    rows = [rows[i : i + 1] for i in range(rows.shape[0])]
    bias = None if bias is None else bias[...].T
    scale = queries[0].shape[0] ** -0.5
    found = tiles.key_sums(_turned(queries), _turned(keys), bias, rows, scale)
    _accumulate(sums, found, out, (scale, 1.0, scale, 1.0))


def _accumulate(sums, found, out, factors):
    """Adds what a tile gives; at the last writes the sums times their factors."""
    step, found, out = pl.program_id(3), jax.tree.leaves(found), jax.tree.leaves(out)

    @pl.when(step == 0)
    def _():
        _write(sums, found)

    @pl.when(step > 0)
    def _():
        _write(sums, [ref[...] + x for ref, x in zip(sums, found, strict=True)])

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        _write(out, [(ref[...] * by).T for ref, by in zip(sums, factors, strict=False)])


value = tiles.make_value_attention(_forward, _reverse)
