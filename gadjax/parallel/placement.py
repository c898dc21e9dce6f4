"""Sharding constraints of activations, for the mesh that a program is traced for."""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")  # mesh axes over which a batch is split
SEQUENCE_AXIS = "sequence"  # mesh axis over which the positions of a sample are split


class Placement(NamedTuple):
    """Mesh that a program is traced for, and the attention kernels it uses: "tpu", "gpu" or "" for
    none."""

    mesh: Mesh
    kernels: str = ""


current_placement = jax.make_user_context(None)  # a Placement, or None where it is unknown


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def sequence_shards(mesh: Mesh, positions: int) -> int:
    """Number of shards of a sample's positions; 1 where the mesh does not divide them."""
    return 1 if positions % mesh.shape[SEQUENCE_AXIS] else mesh.shape[SEQUENCE_AXIS]


def constrain_batch(tree: Any, tokens: bool = False, unconstrained: bool = False) -> Any:
    """Constrain arrays [B, ...] to be sharded along the batch, if the program's mesh is known.

    Without the constraint the compiler may shard activations along their width, as weights are, and
    all-reduce partial products over all devices. With it the weights are gathered instead.

    Args:
      tree: arrays with the batch axis first.
      tokens: shard arrays [B, N, D] along N too, over the devices that share a sample.
      unconstrained: leave the sharding of all other axes to the compiler.
    """
    if current_placement.value is None:
        return tree
    mesh = current_placement.value.mesh

    def place(x):
        if x.ndim == 0 or x.shape[0] % batch_shards(mesh):
            return x
        split = tokens and x.ndim == 3 and sequence_shards(mesh, x.shape[1]) > 1
        spec = PartitionSpec(BATCH_AXES, SEQUENCE_AXIS) if split else PartitionSpec(BATCH_AXES)
        if unconstrained:
            spec = PartitionSpec(BATCH_AXES, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def gather_positions(tree: Any) -> Any:
    """All-gather arrays [B, N, ...] along the sequence axis: each device gets all N positions."""
    if current_placement.value is None or current_placement.value.mesh.shape[SEQUENCE_AXIS] == 1:
        return tree
    mesh, unconstrained = current_placement.value.mesh, PartitionSpec.UNCONSTRAINED

    def place(x):
        spec = PartitionSpec(unconstrained, None, *(unconstrained,) * (x.ndim - 2))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def replicate(x: jax.Array) -> jax.Array:
    """All-gather an array on every device, if the program's mesh is known."""
    if current_placement.value is None:
        return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(current_placement.value.mesh, PartitionSpec())
    )
