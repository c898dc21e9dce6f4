"""Where a program's arrays are to be: the samples on their devices, whoever writes networks."""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SAMPLES = ("data", "fsdp")  # the axes of a mesh over which a batch is split
POSITIONS = "sequence"  # the one over which the positions of a sample are


class Placement(NamedTuple):
    """The mesh that a program is traced for; and whose kernels its attention takes: "tpu", "gpu" or
    "" for none."""

    mesh: Mesh
    kernels: str = ""


placed = jax.make_user_context(None)  # a Placement, where it is known


def shares(mesh: Mesh) -> int:
    """In how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in SAMPLES)


def parts(mesh: Mesh, positions: int) -> int:
    """In how many parts so many positions are split; one, where the mesh does not divide them."""
    return 1 if positions % mesh.shape[POSITIONS] else mesh.shape[POSITIONS]


def by_sample(tree: Any, tokens: bool = False, free: bool = False) -> Any:
    """Arrays [B, ...], each sample on its own devices, wherever the program is placed on a mesh.

    Without a word the compiler may as well cut activations along their width, where weights are
    cut, and sum partial products over all devices. With it the weights come to the samples.

    tokens: whether arrays [B, N, D] are split along N too, over the devices that share a sample.
    free: whether the compiler chooses how axes behind the first are split.
    """
    if placed.value is None:
        return tree
    mesh = placed.value.mesh

    def place(x):
        if x.ndim == 0 or x.shape[0] % shares(mesh):
            return x
        split = tokens and x.ndim == 3 and parts(mesh, x.shape[1]) > 1
        spec = PartitionSpec(SAMPLES, POSITIONS) if split else PartitionSpec(SAMPLES)
        if free:
            spec = PartitionSpec(SAMPLES, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def whole(tree: Any) -> Any:
    """Arrays [B, N, ...], all N positions of a sample on each of its devices."""
    if placed.value is None or placed.value.mesh.shape[POSITIONS] == 1:
        return tree
    mesh, free = placed.value.mesh, PartitionSpec.UNCONSTRAINED

    def place(x):
        spec = PartitionSpec(free, None, *(free,) * (x.ndim - 2))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)
