"""Pallas attention kernels of this device: their errors, and the fastest of their tiles."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from benchmarks.attention import operands, place
from benchmarks.common import Figure, seconds

from gadjax.ops import pallas_gpu
from gadjax.ops.dual_attention import dual_attention
from gadjax.ops.kernels import KERNEL_MODULES, MAX_ERROR
from gadjax.ops.pallas_gpu import Tile

# Positions of a block, warps, stages. Larger tiles than 128 x 128 do not fit registers.
CANDIDATES = tuple(Tile(*sizes) for sizes in product((32, 64, 128), (4, 8), (1, 2)))
# Float32 products of a card are TF32 unless asked otherwise, as they are here.
MAX_ERRORS = {"bfloat16": MAX_ERROR, "float32": 1e-4}


def both_ways(module, interpret: bool) -> Callable:
    """Kernels (q, k, v, tq, tk, tv, do, eo) -> o, o. and the transpose's six cotangents."""

    def run(q, k, v, tq, tk, tv, do, eo):
        options = {"interpret": interpret}
        results = module.dual(q, k, v, None, tq, tk, tv, **options)
        transposed = module.dual_transpose(do, eo, q, k, v, None, tq, tk, tv, *results, **options)
        return *results[:2], *transposed

    return run


def reference(q, k, v, tq, tk, tv, do, eo):
    """The same by the op in blocks."""
    results, transpose = jax.vjp(dual_attention, q, k, v, None, tq, tk, tv)
    dq, dk, dv, _, *tangents = transpose((do, eo))
    return *results, dq, dk, dv, *tangents


def case(shape: tuple[int, int, int], dtype: str, batch: int = 1):
    """Operands of `both_ways` for (positions, heads, channels), and the results in float32."""
    made = operands(shape, jnp.dtype(dtype), batch)
    inputs = [x for part in made for x in part]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(reference)(*(x.astype(jnp.float32) for x in inputs))
    return inputs, expected


def error_of(results, expected) -> float:
    """Largest error of all results, each relative to its largest number."""
    pairs = zip(results, expected, strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def errors(positions: int, channels: tuple[int, ...], dtypes: tuple[str, ...]) -> Iterator[Figure]:
    """Errors of the kernels beside the op in blocks in float32, and whether a run would use them.

    On a CPU the kernels of GPUs run in Pallas' interpreter, and no run uses them.
    """
    platform = jax.default_backend()
    module, interpret = KERNEL_MODULES.get(platform, pallas_gpu), platform == "cpu"
    for dtype in dtypes:
        for size in channels:
            note, value = f"{dtype}, {positions} positions, 2 heads of {size}", None
            inputs, expected = case((positions, 2, size), dtype)
            try:
                with jax.default_matmul_precision("highest"):
                    value = error_of(jax.jit(both_ways(module, interpret))(*inputs), expected)
            except Exception as reason:  # a compiler documents no exception type
                note += f": {' '.join(str(reason).split())[:200]}"
            yield Figure("attention kernels: error", value, MAX_ERRORS[dtype], note=note)
        used = float(bool(place(jax.devices(), dtype).kernels))
        yield Figure("attention kernels: used by attention = 'auto'", used, note=dtype)


def tiles(
    shapes: tuple[tuple[int, int, int], ...],
    dtypes: tuple[str, ...],
    rounds: int,
    table: Path | None = None,
    candidates: tuple[Tile, ...] = CANDIDATES,
) -> Iterator[Figure]:
    """Milliseconds of the kernels of GPUs, forward and reverse, with the default tile and the best.

    Args:
      shapes: (positions, heads, channels); the first of a number of channels decides its tile.
      dtypes: names.
      rounds: runs of which the shortest counts.
      table: file that gets the best tiles of this device, `pallas_gpu.TILES`; None: none does.
      candidates: tiles to try beside the default; those that fail or are wrong are left out.
    """
    for dtype, shape in product(dtypes, shapes):
        inputs, expected = case(shape, dtype)
        with mock.patch.object(pallas_gpu, "tuned_tiles", dict):
            default = pallas_gpu.choose_tile(shape[2], dtype)
        taken = {}
        for tile in dict.fromkeys((default, *candidates)):
            if (program := right_program(tile, inputs, expected, MAX_ERRORS[dtype])) is not None:
                taken[tile] = seconds({"": partial(program, *inputs)}, rounds)[""]
        note = "{}, {} positions, {} heads of {}".format(dtype, *shape)
        if not taken:
            yield Figure("attention kernels: ms, best tile", None, note=f"{note}: no tile is right")
            continue
        best = min(taken, key=taken.get)
        if default in taken:
            yield Figure("attention kernels: ms, default tile", taken[default] * 1e3, note=note)
        note += f": block {best.block}, {best.warps} warps, {best.stages} stages"
        yield Figure("attention kernels: ms, best tile", taken[best] * 1e3, note=note)
        if table is not None:
            add_to_table(table, dtype, shape[2], best)


def right_program(tile: Tile, inputs, expected, most: float) -> Callable | None:
    """Compiled kernels with this tile; None where they do not compile or run, or are wrong."""
    run = both_ways(pallas_gpu, jax.default_backend() == "cpu")
    try:
        with mock.patch.object(pallas_gpu, "choose_tile", lambda channels, dtype: tile):
            program = jax.jit(run).lower(*inputs).compile()
        return program if error_of(program(*inputs), expected) <= most else None
    except Exception:  # a tile that does not fit the card; compilers document no exception type
        return None


def add_to_table(table: Path, dtype: str, channels: int, tile: Tile) -> None:
    """Write the tile of this device, dtype and number of channels into the table."""
    known = json.loads(table.read_text())
    of_dtype = known.setdefault(jax.devices()[0].device_kind, {}).setdefault(dtype, {})
    of_dtype[str(channels)] = list(tile)
    table.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
