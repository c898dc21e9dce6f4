"""Dual attention (value and tangent together) as Pallas kernels for GPUs, lowered through Triton.

The same functions as `gadjax.ops.pallas_tpu`, with the same arithmetic (`gadjax.ops.tiles`):
forward a program for each block of queries, which loops over the keys; reverse one for each block
of queries (dq and dtq) and one for each block of keys (dk, dv, dtk, dtv). Loads and stores are
masked, so that nothing is padded or transposed in memory; a tile's channels are the next power of
two.

On an H200 (JAX 0.11.2) correct in bfloat16 and wrong in float32, where `kernels.kernels_validated`
rejects them; otherwise checked in Pallas' interpreter, and compiled for A100, H100 and B200 too.
Block sizes, warps and stages come from gpu_tiles.json, by device, dtype and channels;
`python tests/benchmarks/run.py gpu --only tiles` measures them and writes the best there. Where it
has none they are not tuned: on an H100 with heads of 72 in bfloat16 the kernels
take 227 to 255 registers a thread and spill at most 20 bytes. Products of float32 follow
`jax.default_matmul_precision`.
"""

import json
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gadjax.ops import tiles
from gadjax.parallel.placement import current_placement

TILES = Path(__file__).with_name("gpu_tiles.json")


class Tile(NamedTuple):
    """Tile of a kernel: positions of a block, warps of a program, stages of its pipeline."""

    block: int
    warps: int = 4
    stages: int = 2


def supported(q, k, bias) -> bool:
    """True where the kernels support these operands and are worthwhile.

    Args:
      q, k: queries [B, N, H, K] and keys [B, M, H, K], arrays or shapes.
      bias: None, or an array that broadcasts to the logits.
    """
    return (
        q.dtype == k.dtype
        and q.dtype in (jnp.bfloat16, jnp.float32)
        and (bias is None or bias.shape[2] == 1)
        and min(q.shape[1], k.shape[1]) >= 64
        and q.shape[3] <= 256
    )


def dual(q, k, v, bias, tq, tk, tv, *, interpret=False):
    """Attention and its tangent (o, o., lse, mu), as `gadjax.ops.pallas_tpu.dual`."""
    (o, to), (lse, mu) = _forward((q, tq), (k, v, tk, tv), bias, interpret)
    return o, to, lse, mu


def dual_transpose(do, eo, q, k, v, bias, tq, tk, tv, o, to, lse, mu, *, interpret=False):
    """Transpose (dq, dk, dv, dtq, dtk, dtv), as `gadjax.ops.pallas_tpu.dual_transpose`."""
    rows = tiles.row_sums(do, eo, o, to, lse, mu)
    (dq, dtq), (dk, dv, dtk, dtv) = _reverse((q, tq, do, eo), (k, v, tk, tv), bias, rows, interpret)
    return dq, dk, dv, dtq, dtk, dtv


@cache
def tuned_tiles() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Tiles that were measured: device kind -> dtype -> channels -> block, warps, stages."""
    return json.loads(TILES.read_text())


def choose_tile(channels: int, dtype) -> Tile:
    """Tile for heads of this size: the tuned one of the program's device, or a default."""
    placement = current_placement.value
    device = jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]
    known = tuned_tiles().get(device.device_kind, {}).get(jnp.dtype(dtype).name, {})
    if str(channels) in known:
        return Tile(*known[str(channels)])
    return Tile(64 if channels <= 64 else 32)


def _width(channels: int) -> int:
    """Number of channels of a tile."""
    return max(16, pl.next_power_of_2(channels))


def _one_head(block, heads, x):
    """BlockSpec of one head of x: [N, K] of [B, N, H, K], or [N] of [B|1, H|1, N].

    N and K are rounded up to full tiles; nothing is read or written beyond x.
    """

    def index(_, program):
        return jax.lax.div(program, heads), jax.lax.rem(program, heads)

    if x.ndim == 4:
        shape = None, pl.cdiv(x.shape[1], block) * block, None, _width(x.shape[3])
        return pl.BlockSpec(shape, lambda *i: (index(*i)[0], 0, index(*i)[1], 0))
    batch, head_count, size = x.shape
    return pl.BlockSpec(
        (None, None, pl.cdiv(size, block) * block),
        lambda *i: (0 if batch == 1 else index(*i)[0], 0 if head_count == 1 else index(*i)[1], 0),
    )


def _call(kernel, positions, operands, results, interpret):
    """Launch kernel(*operands, *results) for each block of positions.

    Args:
      kernel: takes numbers of queries and keys, (block, channels), then refs in these trees.
      positions: number of positions that the grid covers in blocks.
      operands, results: trees of arrays and of shapes.
      interpret: run in Pallas' interpreter.
    """
    query = operands[0][0]
    batch, _, heads, channels = query.shape
    tile = choose_tile(channels, query.dtype)
    block = tile.block
    spec = partial(_one_head, block, heads)
    return pl.pallas_call(
        partial(kernel, query.shape[1], operands[1][0].shape[1], (block, channels)),
        grid=(pl.cdiv(positions, block), batch * heads),
        in_specs=jax.tree.map(spec, operands),
        out_specs=jax.tree.map(spec, results),
        out_shape=results,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
    )(*operands)


def _row(bias, k):
    """Bias over keys in the kernels' layout: [B|1, H|1, M], M rounded up to full tiles."""
    keys, block = k.shape[1], choose_tile(k.shape[3], k.dtype).block
    bias = tiles.key_bias(bias, keys, pl.cdiv(keys, block) * block)
    return bias if bias is None else bias[:, :, 0]


def _like(tree, dtype=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)


def _forward(queries, keys, bias, interpret):
    """Forward kernel: (o, o.) and (lse, mu); o. and mu are None where queries are (q, None)."""
    batch, positions, heads, _ = queries[0].shape
    row = jax.ShapeDtypeStruct((batch, heads, positions), jnp.float32)
    results = _like(queries, jnp.float32), jax.tree.map(lambda _: row, queries)
    operands = queries, keys, _row(bias, keys[0])
    return _call(_forward_kernel, positions, operands, results, interpret)


def _reverse(queries, keys, bias, rows, interpret):
    """Reverse kernels: (dq, dtq) and (dk, dv, dtk, dtv) of queries = (q, tq, do, eo); None where
    the operand is."""
    operands = queries, keys, _row(bias, keys[0]), rows
    dq = _call(_query_kernel, queries[0].shape[1], operands, (_like(queries[:2]),), interpret)
    dk = _call(_key_kernel, keys[0].shape[1], operands, (_like(keys),), interpret)
    return dq[0], dk[0]


def _window(ref, step, positions, size):
    """Slice of ref [N] or [N, K] for a tile of size (block, channels), and the mask of its valid
    elements."""
    block, channels = size
    positions_slice = pl.ds(step * block, block)
    valid = step * block + jnp.arange(block) < positions
    if len(ref.shape) == 1:
        return ref.at[positions_slice], valid
    valid_channels = jnp.arange(_width(channels)) < channels
    return ref.at[positions_slice, :], valid[:, None] & valid_channels[None, :]


def _read(refs, step, positions, size):
    """Load tiles, zero outside the arrays."""

    def tile(ref):
        part, mask = _window(ref, step, positions, size)
        return plgpu.load(part, mask=mask, other=0.0)

    return jax.tree.map(tile, refs)


def _write(refs, values, step, positions, size):
    for ref, x in zip(jax.tree.leaves(refs), jax.tree.leaves(values), strict=True):
        part, mask = _window(ref, step, positions, size)
        plgpu.store(part, x.astype(ref.dtype), mask=mask)


def _bias(ref, step, size, axis):
    """Load a tile's bias, [1, m] or [m, 1]: `axis` is the new axis."""
    if ref is None:
        return None
    return jnp.expand_dims(_read(ref, step, ref.shape[0], size), axis)


def _sum(tile, steps):
    """Sum tile(i) over i = 0 .. steps - 1."""
    return jax.lax.fori_loop(1, steps, lambda i, acc: jax.tree.map(jnp.add, acc, tile(i)), tile(0))


def _forward_kernel(n, m, size, queries, keys, bias, out, rows):
    index, scale = pl.program_id(0), size[1] ** -0.5
    q = _read(queries, index, n, size)

    def step(i, state):
        k = _read(keys, i, m, size)
        row = _bias(bias, i, size, 0)
        return tiles.add_tile(state, *tiles.logits(q, k, row, scale), k[1], k[3])

    state = tiles.initial_state(*q[0].shape, q[1] is not None)
    state = jax.lax.fori_loop(0, pl.cdiv(m, size[0]), step, state)
    results, columns = tiles.finalize(state)
    _write(out, results, index, n, size)
    _write(rows, jax.tree.map(lambda x: x.sum(-1), columns), index, n, size)


def _query_kernel(n, m, size, queries, keys, bias, rows, out):
    index, scale = pl.program_id(0), size[1] ** -0.5
    q = _read(queries, index, n, size)
    columns = [x[:, None] for x in jax.tree.leaves(_read(rows, index, n, size))]

    def tile(i):
        row = _bias(bias, i, size, 0)
        return tiles.query_sums(q, _read(keys, i, m, size), row, columns, scale)

    sums = _sum(tile, pl.cdiv(m, size[0]))
    _write(out, jax.tree.map(lambda x: x * scale, sums), index, n, size)


def _key_kernel(n, m, size, queries, keys, bias, rows, out):
    index, scale = pl.program_id(0), size[1] ** -0.5
    k, column = _read(keys, index, m, size), _bias(bias, index, size, 1)

    def tile(i):
        statistics = [x[None, :] for x in jax.tree.leaves(_read(rows, i, n, size))]
        return tiles.key_sums(_read(queries, i, n, size), k, column, statistics, scale)

    dk, dv, dtk, dtv = _sum(tile, pl.cdiv(n, size[0]))
    dk, dtk = jax.tree.map(lambda x: x * scale, (dk, dtk))
    _write(out, (dk, dv, dtk, dtv), index, m, size)


value = tiles.make_value_attention(_forward, _reverse)
