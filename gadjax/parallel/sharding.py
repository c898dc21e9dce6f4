"""Device mesh, and sharding rules by parameter path."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gadjax.errors import InputError
from gadjax.parallel.placement import BATCH_AXES, SEQUENCE_AXIS, batch_shards

AXES = (*BATCH_AXES, "tensor", SEQUENCE_AXIS)
MIN_SHARDED_SIZE = 2**16  # elements below which a leaf without a rule is replicated
HOST_MEMORY = "pinned_host"  # JAX's memory kind
DISCRIMINATOR_RULES = ((r"(^|/)discriminator/", PartitionSpec()),)  # for a training state


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Create a (data, fsdp, tensor, sequence) mesh.

    Several TPU slices split the data axis, so that only the all-reduce of gradients crosses slices.

    Args:
      sizes: axis -> size, by default 1; one may be -1, for the remaining devices.
      devices: by default all.

    Raises: InputError where the sizes do not multiply to the number of devices; it names a size
      that would.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) == 1:
        rest = math.prod(n for n in shape if n != -1)
        shape = [len(devices) // max(rest, 1) if n == -1 else n for n in shape]
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise InputError(
            f"mesh: found {dict(sizes)}; expected sizes that multiply to {len(devices)} devices"
            f"{_nearest_size(sizes, len(devices))}"
        )
    # GPUs count a node as a slice; between those fsdp is usual.
    slices = len({getattr(d, "slice_index", 0) if d.platform == "tpu" else 0 for d in devices})
    if shape[0] % slices:
        raise InputError(
            f"mesh.data: found {shape[0]}; expected a multiple of the {slices} slices, between "
            "which the network is slow"
        )
    if slices > 1:
        inner, outer = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
        device_grid = create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    else:
        device_grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto: the default (Explicit) requires every operation to be annotated.
    return Mesh(device_grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _nearest_size(sizes: Mapping[str, int], count: int) -> str:
    """Suggest the nearest change of one axis with which sizes multiply to `count`, if any does."""
    shape = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    if list(shape.values()).count(-1) > 1:
        return ", of which one at most is -1"
    candidates = []
    for axis, size in shape.items():
        rest = math.prod(n for other, n in shape.items() if other != axis and n != -1)
        if size == -1 or rest < 1 or count % rest:
            continue
        exact = [count // rest] if -1 not in shape.values() else divisors(count // rest)
        candidates += [(abs(math.log(n / max(size, 0.5))), axis, n) for n in exact]
    if not candidates:
        return ""
    _, axis, n = min(candidates)
    return f" (mesh.{axis}={n} would, where {shape[axis]} does not)"


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, rules: Sequence[tuple[str, PartitionSpec]], mesh: Mesh) -> Any:
    """Shardings of all leaves by rules: the first regex that matches the leaf's path decides.

    Optimizer moments and averages end in the same path as their parameter, so one set of rules
    covers them. A leaf of MIN_SHARDED_SIZE elements or more that its rule leaves whole on this
    mesh, such as the stacked biases of many layers, or an adapter's half whose axis is that of
    "tensor" where the mesh has none, is sharded over fsdp along the last axis that fsdp divides.

    Args:
      tree: arrays or their shapes.
      rules: (regex of the path, PartitionSpec); a leading ^ is the start of a network's path.
      mesh: axes that it lacks are dropped from the specs.

    Returns: a tree of NamedSharding.
    Raises: InputError for a leaf of MIN_SHARDED_SIZE elements or more without a rule, and for a
      dimension that its mesh axis does not divide.
    """

    # A rule's ^ is the start of a network's path, which is nested deeper in a training state.
    anchored = [(re.sub(r"^\^", "(?:^|/)", pattern), spec) for pattern, spec in rules]
    sharded: list[tuple[str, int, str]] = []  # mesh axis, size and path of large sharded dimensions

    def place(path, leaf):
        name = path_name(path)
        spec = next((spec for pattern, spec in anchored if re.search(pattern, name)), None)
        if spec is None or len(leaf.shape) < len(spec):
            if math.prod(leaf.shape) >= MIN_SHARDED_SIZE:
                raise InputError(f"sharding: found no rule for {name} {tuple(leaf.shape)}")
            spec = PartitionSpec()
        splits = any(mesh.shape.get(axis, 1) > 1 for axis in spec)
        if math.prod(leaf.shape) >= MIN_SHARDED_SIZE and not splits:
            spec = shard_last_axis(leaf.shape, mesh)
        spec = PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in spec))
        sides = [(a, n) for n, a in zip(leaf.shape, spec, strict=False) if a is not None]
        if math.prod(leaf.shape) >= MIN_SHARDED_SIZE:
            sharded.extend((axis, size, name) for axis, size in sides)
        elif any(size % mesh.shape[axis] for axis, size in sides):
            spec = PartitionSpec()
        return NamedSharding(mesh, spec)

    placements = jax.tree_util.tree_map_with_path(place, tree)
    for axis, size, name in sharded:
        if size % (axis_size := mesh.shape[axis]):
            fit = math.gcd(mesh.size, *(n for other, n, _ in sharded if other == axis))
            nearest = min(divisors(fit), key=lambda n: abs(math.log(n / axis_size)))
            raise InputError(
                f"mesh.{axis}: found {axis_size}; expected a divisor of {size} ({name}), the "
                f"nearest that suits all being {nearest}"
            )
    return placements


def shard_last_axis(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Spec that shards over fsdp along the last axis that fsdp divides; replicated without one."""
    fits = [i for i, n in enumerate(shape) if n % mesh.shape.get("fsdp", 1) == 0]
    return PartitionSpec(*[None] * fits[-1], "fsdp") if fits else PartitionSpec()


def shapes_with_shardings(tree: Any, placements: Any) -> Any:
    """ShapeDtypeStructs, with their shardings, of arrays or shapes."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, placements
    )


def in_host_memory(tree: Any) -> Any:
    """Shardings moved to pinned host memory (offload)."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST_MEMORY), tree)


def put_on_mesh(tree: Any, placements: Any) -> Any:
    """Shard arrays that every process holds in full."""
    if jax.process_count() == 1:
        return jax.device_put(tree, placements)

    def one(x, place):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    return jax.tree.map(one, tree, placements)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: the leading axis over the axes BATCH_AXES."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(sharding: NamedSharding, size: int) -> tuple[int, int]:
    """Range (start, stop) of a batch's rows that this process's devices hold."""
    parts = sharding.addressable_devices_indices_map((size,)).values()
    starts, stops, _ = zip(*(part[0].indices(size) for part in parts), strict=True)
    return min(starts), max(stops)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch: int, microbatch: int, mesh: Mesh) -> int:
    """Number of microbatches of a batch.

    Args:
      batch, microbatch: sizes in samples.
      mesh: its batch shards must divide a microbatch.

    Raises: InputError where microbatches do not divide the batch, or shards a microbatch.
    """
    if microbatch <= 0 or batch % microbatch:
        raise InputError(f"microbatch: found {microbatch}; expected a divisor of batch ({batch})")
    if microbatch % (count := batch_shards(mesh)):
        raise InputError(
            f"microbatch: found {microbatch}; expected a multiple of the mesh's {count} shares "
            f"({' x '.join(BATCH_AXES)})"
        )
    return batch // microbatch
