"""Dual attention (value and tangent together) as Pallas kernels for TPUs.

`dual` and its transpose compute what `gadjax.ops.dual_attention` computes, without anything of size
N x M in HBM; `value` is attention alone, by the same kernels. There are three: forward, which sums
over blocks of keys; and in reverse one that sums over blocks of keys, for dq and dtq, and one that
sums over blocks of queries, with transposed tiles, for dk, dv, dtk and dtv. A tile takes 6 products
of n x m x K forward and 9 + 12 in reverse, where the jnp op, which sums everything at once, takes
15.

Positions lie along the lanes, as [B, H, K, N], and a block is transposed once it is in VMEM: with
the K of a head along the lanes, 64 or 72 channels would take the space and bandwidth of 128 in HBM.

VMEM: a block has at most 512 positions, transposed of 512 bytes each, 256 KiB. In reverse eight
operands and up to four results are copied in blocks, each double-buffered; four sums in float32,
1 MiB; tiles of logits in float32 take 1 MiB, of which the compiler keeps about five at once. It
grants a kernel 16 MiB on v5e, and compiles these for bfloat16 within 6 MiB where K <= 72, within
8 MiB where it is 128. Nothing grows with N or M.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gadjax.ops import tiles

LANES = 128


def supported(q, k, bias) -> bool:
    """True where the kernels support these operands and are worthwhile.

    With fewer positions most of a tile would be padding.

    Args:
      q, k: queries [B, N, H, K] and keys [B, M, H, K], arrays or shapes.
      bias: None, or an array that broadcasts to the logits.
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
    """Attention and its tangent, with the row statistics that `dual_transpose` needs.

    Args:
      q, tq: queries and their tangents [B, N, H, K].
      k, v, tk, tv: keys and values [B, M, H, K]; tk and tv both None for constant keys.
      bias: None or [B|1, H|1, 1, M]. lse is of the logits plus the bias minus its maximum.
      interpret: run in Pallas' interpreter.

    Returns: (o, o., lse, mu), the first two [B, N, H, K], the last two [B, H, N], all in float32.
      Rounded to bfloat16, o and o. would cost the transpose a digit where keys or values have a
      common component, since differences of all keys are taken from them.
    """
    (o, to), (lse, mu) = _forward((q, tq), (k, v, tk, tv), bias, interpret)
    return o, to, lse, mu


def dual_transpose(do, eo, q, k, v, bias, tq, tk, tv, o, to, lse, mu, *, interpret=False):
    """Transpose of `dual`: cotangents of its operands.

    Args:
      do, eo: cotangents of o and o., [B, N, H, K] in the dtype of q.
      q, k, v, bias, tq, tk, tv, interpret: as for `dual`.
      o, to, lse, mu: its results.

    Returns: (dq, dk, dv, dtq, dtk, dtv) in the dtypes of q and k; dtk and dtv are None where tk and
      tv are.
    """
    rows = tiles.row_sums(do, eo, o, to, lse, mu)
    (dq, dtq), (dk, dv, dtk, dtv) = _reverse((q, tq, do, eo), (k, v, tk, tv), bias, rows, interpret)
    return dq, dk, dv, dtq, dtk, dtv


def block(positions: int, x) -> int:
    """Block size with the least padding: at most 512 positions of 512 bytes each.

    x: an operand [..., K].
    """
    wide = -(-x.shape[-1] // LANES) * LANES * x.dtype.itemsize > 512
    largest = 256 if wide else 512
    if positions <= largest:
        return -(-positions // LANES) * LANES
    sizes = largest, largest - LANES, largest // 2
    return min(sizes, key=lambda size: -(-positions // size) * size)


def _heads_first(x, size):
    """Transpose [B, N, H, K] to [B, H, K, N], N padded to a multiple of the block size."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)]).transpose(0, 2, 3, 1)


def _heads_last(x, positions):
    return x.transpose(0, 3, 1, 2)[:, :positions]


def _like(tree, dtype=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)


def _along(size, axis, x):
    """BlockSpec of blocks [R, size] of x [B|1, H|1, R, N], indexed along N by this grid axis."""
    batch, heads, rows, _ = x.shape
    return pl.BlockSpec(
        (None, None, rows, size),
        lambda *i: (0 if batch == 1 else i[0], 0 if heads == 1 else i[1], 0, i[axis]),
    )


def _call(kernel, grid, operands, results, sums, interpret):
    """Launch kernel(*operands, *results, *sums).

    Args:
      kernel: takes refs in these trees.
      grid: its last axis is the one that is summed over.
      operands, results: (tree of arrays or shapes, its block spec `_along`).
      sums: shapes of the accumulators in VMEM.
      interpret: run in Pallas' interpreter.
    """
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


def _prepare(queries, keys, bias):
    """Operands in the kernels' layout, the block sizes (n, m) and the numbers of blocks."""
    n, m = (block(x.shape[1], x) for x in (queries[0], keys[0]))
    bias = tiles.key_bias(bias, keys[0].shape[1], -(-keys[0].shape[1] // m) * m)
    queries = jax.tree.map(partial(_heads_first, size=n), queries)
    keys = jax.tree.map(partial(_heads_first, size=m), keys)
    return queries, keys, bias, (n, m), (queries[0].shape[3] // n, keys[0].shape[3] // m)


def _forward(queries, keys, bias, interpret):
    """Forward kernel: (o, o.) and (lse, mu); o. and mu are None where queries are (q, None)."""
    positions, tangent = queries[0].shape[1], queries[1] is not None
    queries, keys, bias, (n, m), steps = _prepare(queries, keys, bias)
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
    """Reverse kernels: (dq, dtq) and (dk, dv, dtk, dtv) of queries = (q, tq, do, eo); None where
    the operand is."""
    query_count, key_count = queries[0].shape[1], keys[0].shape[1]
    queries, keys, bias, (n, m), (down, along) = _prepare(queries, keys, bias)
    batch, heads, channels, padded = queries[0].shape
    rows = jnp.stack([x for x in rows if x is not None], axis=2)
    rows = jnp.pad(rows, [(0, 0)] * 3 + [(0, padded - query_count)])

    def sums(kernel, grid, size, results, query, key):
        """Launch one kernel; `results`: operands that give the shapes of its sums.

        query, key: grid axes of the blocks of queries and of keys.
        """
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
        jax.tree.map(partial(_heads_last, positions=query_count), dq),
        jax.tree.map(partial(_heads_last, positions=key_count), dk),
    )


def _read(refs):
    return jax.tree.map(lambda ref: ref[...], refs)


def _transpose(values):
    return jax.tree.map(lambda x: x[...].T, values)


def _write(refs, values):
    for ref, x in zip(jax.tree.leaves(refs), jax.tree.leaves(values), strict=True):
        ref[...] = x.astype(ref.dtype)


def _forward_kernel(queries, keys, bias, out, rows, *state):
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        _write(state, tiles.initial_state(*queries[0].shape[::-1], queries[1] is not None))

    keys = _transpose(keys)
    s, ts = tiles.logits(_transpose(queries), keys, _read(bias), queries[0].shape[0] ** -0.5)
    _write(state, tiles.add_tile(_read(state), s, ts, keys[1], keys[3]))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        results, columns = tiles.finalize(_read(state))
        _write(out, _transpose(results))
        rows[...] = jnp.concatenate(jax.tree.leaves(columns), axis=1).T


def _query_kernel(queries, keys, bias, rows, out, *sums):
    rows = rows[...].T
    rows = [rows[:, i : i + 1] for i in range(rows.shape[1])]
    scale = queries[0].shape[0] ** -0.5
    tile_sums = tiles.query_sums(_transpose(queries), _transpose(keys), _read(bias), rows, scale)
    _accumulate(sums, tile_sums, out, (scale, scale))


def _key_kernel(queries, keys, bias, rows, out, *sums):
    rows = [rows[i : i + 1] for i in range(rows.shape[0])]
    bias = None if bias is None else bias[...].T
    scale = queries[0].shape[0] ** -0.5
    tile_sums = tiles.key_sums(_transpose(queries), _transpose(keys), bias, rows, scale)
    _accumulate(sums, tile_sums, out, (scale, 1.0, scale, 1.0))


def _accumulate(sums, tile_sums, out, factors):
    """Add a tile's sums; after the last tile write the totals times their factors."""
    step, tile_sums, out = pl.program_id(3), jax.tree.leaves(tile_sums), jax.tree.leaves(out)

    @pl.when(step == 0)
    def _():
        _write(sums, tile_sums)

    @pl.when(step > 0)
    def _():
        _write(sums, [ref[...] + x for ref, x in zip(sums, tile_sums, strict=True)])

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        _write(out, [(ref[...] * factor).T for ref, factor in zip(sums, factors, strict=False)])


value = tiles.make_value_attention(_forward, _reverse)
