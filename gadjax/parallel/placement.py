"""Where a program's arrays are to be: the samples on their devices, whoever writes networks."""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")  # the axes of a mesh over which a batch is split
SEQUENCE_AXIS = "sequence"  # the one over which the positions of a sample are


class Placement(NamedTuple):
    """The mesh that a program is traced for; and whose kernels its attention takes: "tpu", "gpu" or
    "" for none."""

    mesh: Mesh
    kernels: str = ""


current_placement = jax.make_user_context(None)  # a Placement, where it is known


def batch_shards(mesh: Mesh) -> int:
    """In how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def sequence_shards(mesh: Mesh, positions: int) -> int:
    """In how many parts so many positions are split; one, where the mesh does not divide them."""
    return 1 if positions % mesh.shape[SEQUENCE_AXIS] else mesh.shape[SEQUENCE_AXIS]


def constrain_batch(tree: Any, tokens: bool = False, unconstrained: bool = False) -> Any:
    """Arrays [B, ...], each sample on its own devices, wherever the program is placed on a mesh.

    Without a word the compiler may as well cut activations along their width, where weights are
    cut, and sum partial products over all devices. With it the weights come to the samples.

    tokens: whether arrays [B, N, D] are split along N too, over the devices that share a sample.
    free: whether the compiler chooses how axes behind the first are split.
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
    """Arrays [B, N, ...], all N positions of a sample on each of its devices."""
    if current_placement.value is None or current_placement.value.mesh.shape[SEQUENCE_AXIS] == 1:
        return tree
    mesh, unconstrained = current_placement.value.mesh, PartitionSpec.UNCONSTRAINED

    def place(x):
        spec = PartitionSpec(unconstrained, None, *(unconstrained,) * (x.ndim - 2))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)
