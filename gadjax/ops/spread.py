"""An attention on several devices, each with its own samples, heads and queries."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from gadjax.parallel.placement import POSITIONS, SAMPLES, parts, placed, shares


def splitting(q: jax.Array) -> Mesh | None:
    """The mesh that the program is placed on, where it splits the positions of these queries."""
    if placed.value is None:
        return None
    mesh = placed.value.mesh
    return None if q.shape[0] % shares(mesh) or parts(mesh, q.shape[1]) == 1 else mesh


def spread(f: Callable, mesh: Mesh, queries: Any, keys: Any, bias: jax.Array | None) -> Any:
    """f(queries, keys, bias), on every device for its own samples, heads and queries.

    The compiler cannot cut a kernel, and would move activations where it cuts a loop over queries.

    Args:
      f: returns (a tree like `queries`, a tree like `keys` that is summed over the queries).
      queries: arrays [B, N, H, K] and [B, H, N]. The mesh has to divide B; it splits H and N where
        it divides them.
      keys: arrays [B, M, H, K]. Every device has all M.
      bias: None, or what broadcasts to the logits [B, H, N, M].
    """
    q, k = (jax.tree.leaves(tree)[0] for tree in (queries, keys))
    heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None
    rows = POSITIONS if parts(mesh, q.shape[1]) > 1 else None
    # Keys of the queries' own tokens lie where those do; others (a text's) are everywhere.
    own = rows if k.shape[1] == q.shape[1] else None

    def place(x, along):
        return PartitionSpec(SAMPLES, *((along, heads) if x.ndim == 4 else (heads, along)))

    def row(x):
        axes = zip(x.shape, (SAMPLES, heads, rows), strict=False)
        return PartitionSpec(*(axis if size > 1 else None for size, axis in axes))

    def gather(x):
        return jax.lax.all_gather(x, POSITIONS, axis=1, tiled=True) if own else x

    def total(x):
        if own:
            return jax.lax.psum_scatter(x, POSITIONS, scatter_dimension=1, tiled=True)
        return jax.lax.psum(x, POSITIONS) if rows else x

    def on_one(queries, keys, bias):
        each, summed = f(queries, jax.tree.map(gather, keys), bias)
        return each, jax.tree.map(total, summed)

    def places(queries, keys):
        first = jax.tree.map(lambda x: place(x, rows), queries)
        return first, jax.tree.map(lambda x: place(x, own), keys)

    on_each = jax.shard_map(
        on_one,
        mesh=mesh,
        in_specs=(*places(queries, keys), jax.tree.map(row, bias)),
        out_specs=places(*jax.eval_shape(f, queries, keys, bias)),
        check_vma=False,
    )
    return on_each(queries, keys, bias)
