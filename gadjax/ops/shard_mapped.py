"""Attention under shard_map: every device computes its own samples, heads and queries."""

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
    """Mesh of the traced program where it splits the positions of these queries, else None."""
    if current_placement.value is None:
        return None
    mesh = current_placement.value.mesh
    return (
        None if q.shape[0] % batch_shards(mesh) or sequence_shards(mesh, q.shape[1]) == 1 else mesh
    )


def is_on_cpu(mesh: Mesh | None) -> bool:
    """True if a traced program, or its part under shard_map over `mesh`, has one CPU to itself."""
    placement = current_placement.value
    if placement is None:
        return jax.default_backend() == "cpu"
    alone = mesh is not None or placement.mesh.size == 1
    return alone and placement.mesh.devices.flat[0].platform == "cpu"


def shard_mapped(f: Callable, mesh: Mesh, queries: Any, keys: Any, bias: jax.Array | None) -> Any:
    """Run f(queries, keys, bias) under shard_map over samples, heads and queries.

    The compiler cannot partition a Pallas kernel, and would reshard activations to partition a loop
    over queries.

    Args:
      f: returns (a tree like `queries`, a tree like `keys` that is summed over the queries).
      mesh: of the traced program.
      queries: arrays [B, N, H, K] and [B, H, N]. The mesh has to divide B; it splits H and N where
        it divides them.
      keys: arrays [B, M, H, K]. Every device has all M.
      bias: None, or an array that broadcasts to the logits [B, H, N, M].

    Returns: the results of f, of all devices.
    """
    q, k = (jax.tree.leaves(tree)[0] for tree in (queries, keys))
    heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None
    rows = SEQUENCE_AXIS if sequence_shards(mesh, q.shape[1]) > 1 else None
    # In self-attention keys are sharded like queries; in cross-attention they are replicated.
    key_rows = rows if k.shape[1] == q.shape[1] else None

    def spec(x, along):
        return PartitionSpec(BATCH_AXES, *((along, heads) if x.ndim == 4 else (heads, along)))

    def bias_spec(x):
        axes = zip(x.shape, (BATCH_AXES, heads, rows), strict=False)
        return PartitionSpec(*(axis if size > 1 else None for size, axis in axes))

    def gather(x):
        return jax.lax.all_gather(x, SEQUENCE_AXIS, axis=1, tiled=True) if key_rows else x

    def reduce(x):
        if key_rows:
            return jax.lax.psum_scatter(x, SEQUENCE_AXIS, scatter_dimension=1, tiled=True)
        return jax.lax.psum(x, SEQUENCE_AXIS) if rows else x

    def on_device(queries, keys, bias):
        per_query, summed = f(queries, jax.tree.map(gather, keys), bias)
        return per_query, jax.tree.map(reduce, summed)

    def specs(queries, keys):
        query_specs = jax.tree.map(lambda x: spec(x, rows), queries)
        return query_specs, jax.tree.map(lambda x: spec(x, key_rows), keys)

    sharded = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(*specs(queries, keys), jax.tree.map(bias_spec, bias)),
        out_specs=specs(*jax.eval_shape(f, queries, keys, bias)),
        check_vma=False,
    )
    return sharded(queries, keys, bias)
