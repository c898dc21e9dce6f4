"""An attention on several devices, each with its own samples, heads and queries."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from gadjax.parallel.placement import (
    BATCH_AXES,
    SEQUENCE_AXIS,
    batch_shards,
    current_placement,
    sequence_shards,
)


def sequence_mesh(q: jax.Array) -> Mesh | None:
    """The mesh that the program is placed on, where it splits the positions of these queries."""
    if current_placement.value is None:
        return None
    mesh = current_placement.value.mesh
    return (
        None if q.shape[0] % batch_shards(mesh) or sequence_shards(mesh, q.shape[1]) == 1 else mesh
    )


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
    rows = SEQUENCE_AXIS if sequence_shards(mesh, q.shape[1]) > 1 else None
    # Keys of the queries' own tokens lie where those do; others (a text's) are everywhere.
    own = rows if k.shape[1] == q.shape[1] else None

    def place(x, along):
        return PartitionSpec(BATCH_AXES, *((along, heads) if x.ndim == 4 else (heads, along)))

    def row(x):
        axes = zip(x.shape, (BATCH_AXES, heads, rows), strict=False)
        return PartitionSpec(*(axis if size > 1 else None for size, axis in axes))

    def gather(x):
        return jax.lax.all_gather(x, SEQUENCE_AXIS, axis=1, tiled=True) if own else x

    def total(x):
        if own:
            return jax.lax.psum_scatter(x, SEQUENCE_AXIS, scatter_dimension=1, tiled=True)
        return jax.lax.psum(x, SEQUENCE_AXIS) if rows else x

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
