"""Where a program's arrays are to be: the samples on their devices, whoever writes networks."""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SAMPLES = ("data", "fsdp")  # the axes of a mesh over which a batch is split


class Placement(NamedTuple):
    """The mesh that a program is traced for; and whose kernels its attention takes: "tpu", "gpu" or
    "" for none."""

    mesh: Mesh
    kernels: str = ""


placed = jax.make_user_context(None)  # a Placement, where it is known


def by_sample(tree: Any) -> Any:
    """Arrays [B, ...], each sample whole on its device, wherever the program is placed on a mesh.

    Without a word the compiler may as well cut activations along their width, where weights are
    cut, and sum partial products over all devices. With it the weights come to the samples.
    """
    if placed.value is None:
        return tree
    mesh = placed.value.mesh
    shares = math.prod(mesh.shape[axis] for axis in SAMPLES)
    sharding = NamedSharding(mesh, PartitionSpec(SAMPLES))

    def place(x):
        if x.ndim == 0 or x.shape[0] % shares:
            return x
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(place, tree)
