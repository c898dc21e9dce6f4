"""Where every array lives: a mesh, and rules by path."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gadjax.errors import InputError

AXES = ("data", "fsdp", "tensor")
SAMPLES = ("data", "fsdp")  # the axes over which a batch is split
SMALL = 2**16  # elements below which a leaf that no rule names is replicated
HEADS = ((r"(^|/)discriminator/", PartitionSpec()),)  # of a training state, beside its networks


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh; a size of -1 takes what the others leave.

    Raises: InputError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    wanted = [int(sizes.get(axis, 1)) for axis in AXES]
    if wanted.count(-1) == 1:
        rest = math.prod(n for n in wanted if n != -1)
        wanted = [len(devices) // max(rest, 1) if n == -1 else n for n in wanted]
    if min(wanted) < 1 or math.prod(wanted) != len(devices):
        raise InputError(
            f"mesh: found {dict(sizes)}; expected sizes that multiply to {len(devices)} devices"
        )
    # Auto: the default (Explicit) wants every operation annotated.
    return jax.make_mesh(tuple(wanted), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, rules: Sequence[tuple[str, PartitionSpec]], mesh: Mesh) -> Any:
    """A NamedSharding for every leaf: the first rule whose regex is found in the leaf's path.

    Optimizer moments and averages end in the same path as their parameter, so one set of rules
    covers them. Raises: InputError for a leaf of 65,536 elements or more that no rule names, and
    for a dimension that its mesh axis does not divide.
    """

    # A rule's ^ is the start of a network's own path, which stands deeper in a training state.
    anchored = [(re.sub(r"^\^", "(?:^|/)", pattern), spec) for pattern, spec in rules]

    def place(path, leaf):
        name = path_name(path)
        spec = next((spec for pattern, spec in anchored if re.search(pattern, name)), None)
        if spec is None or len(leaf.shape) < len(spec):
            if math.prod(leaf.shape) >= SMALL:
                raise InputError(f"sharding: found no rule for {name} {tuple(leaf.shape)}")
            spec = PartitionSpec()
        spec = PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in spec))
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                if math.prod(leaf.shape) < SMALL:
                    spec = PartitionSpec()
                    break
                raise InputError(
                    f"mesh.{axis}: found {mesh.shape[axis]}; expected a divisor of {size} ({name})"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices but those that share samples."""
    return NamedSharding(mesh, PartitionSpec(SAMPLES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch: int, microbatch: int, mesh: Mesh) -> int:
    """The number of microbatches. Raises: InputError where the mesh does not divide one."""
    if microbatch <= 0 or batch % microbatch:
        raise InputError(f"microbatch: found {microbatch}; expected a divisor of batch ({batch})")
    shares = math.prod(mesh.shape[axis] for axis in SAMPLES)
    if microbatch % shares:
        raise InputError(
            f"microbatch: found {microbatch}; expected a multiple of the mesh's {shares} shares "
            f"({' x '.join(SAMPLES)})"
        )
    return batch // microbatch
