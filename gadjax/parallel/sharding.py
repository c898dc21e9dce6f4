"""Where every array lives: a mesh, and rules by path."""

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
SMALL = 2**16  # elements below which a leaf that no rule names is replicated
HOST_MEMORY = "pinned_host"  # JAX's name for the host's memory
DISCRIMINATOR_RULES = (
    (r"(^|/)discriminator/", PartitionSpec()),
)  # of a training state, beside its networks


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor, sequence) mesh; a size of -1 takes what the others leave. Of several
    TPU slices each holds whole shares of `data`, so that only the sum of gradients goes from slice
    to slice.

    Raises: InputError where the sizes do not multiply to the number of devices, with a size that
    would.
    """
    devices = jax.devices() if devices is None else list(devices)
    wanted = [int(sizes.get(axis, 1)) for axis in AXES]
    if wanted.count(-1) == 1:
        rest = math.prod(n for n in wanted if n != -1)
        wanted = [len(devices) // max(rest, 1) if n == -1 else n for n in wanted]
    if min(wanted) < 1 or math.prod(wanted) != len(devices):
        raise InputError(
            f"mesh: found {dict(sizes)}; expected sizes that multiply to {len(devices)} devices"
            f"{_nearest_size(sizes, len(devices))}"
        )
    # GPUs count a node as a slice; between those fsdp is usual.
    slices = len({getattr(d, "slice_index", 0) if d.platform == "tpu" else 0 for d in devices})
    if wanted[0] % slices:
        raise InputError(
            f"mesh.data: found {wanted[0]}; expected a multiple of the {slices} slices, between "
            "which the network is slow"
        )
    if slices > 1:
        inner, outer = (wanted[0] // slices, *wanted[1:]), (slices, 1, 1, 1)
        placed = create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    else:
        placed = create_device_mesh(wanted, devices, allow_split_physical_axes=True)
    # Auto: the default (Explicit) wants every operation annotated.
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _nearest_size(sizes: Mapping[str, int], count: int) -> str:
    """What to change of sizes that do not multiply to `count`: one axis, if that is enough."""
    wanted = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    if list(wanted.values()).count(-1) > 1:
        return ", of which one at most is -1"
    found = []
    for axis, size in wanted.items():
        rest = math.prod(n for other, n in wanted.items() if other != axis and n != -1)
        if size == -1 or rest < 1 or count % rest:
            continue
        exact = [count // rest] if -1 not in wanted.values() else divisors(count // rest)
        found += [(abs(math.log(n / max(size, 0.5))), axis, n) for n in exact]
    if not found:
        return ""
    _, axis, n = min(found)
    return f" (mesh.{axis}={n} would, where {wanted[axis]} does not)"


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, rules: Sequence[tuple[str, PartitionSpec]], mesh: Mesh) -> Any:
    """A NamedSharding for every leaf: the first rule whose regex is found in the leaf's path.

    Optimizer moments and averages end in the same path as their parameter, so one set of rules
    covers them. What a rule leaves whole is cut all the same where it has 65,536 elements or more,
    as the biases of many layers do: along the last axis that fsdp divides. Raises: InputError for a
    leaf of that size that no rule names, and for a dimension that its mesh axis does not divide.
    """

    # A rule's ^ is the start of a network's own path, which stands deeper in a training state.
    anchored = [(re.sub(r"^\^", "(?:^|/)", pattern), spec) for pattern, spec in rules]
    cut: list[tuple[str, int, str]] = []  # axis, size and path of what is split and not small

    def place(path, leaf):
        name = path_name(path)
        spec = next((spec for pattern, spec in anchored if re.search(pattern, name)), None)
        if spec is None or len(leaf.shape) < len(spec):
            if math.prod(leaf.shape) >= SMALL:
                raise InputError(f"sharding: found no rule for {name} {tuple(leaf.shape)}")
            spec = PartitionSpec()
        if math.prod(leaf.shape) >= SMALL and not any(spec):
            spec = last_cut(leaf.shape, mesh)
        spec = PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in spec))
        sides = [(a, n) for n, a in zip(leaf.shape, spec, strict=False) if a is not None]
        if math.prod(leaf.shape) >= SMALL:
            cut.extend((axis, size, name) for axis, size in sides)
        elif any(size % mesh.shape[axis] for axis, size in sides):
            spec = PartitionSpec()
        return NamedSharding(mesh, spec)

    placed = jax.tree_util.tree_map_with_path(place, tree)
    for axis, size, name in cut:
        if size % (found := mesh.shape[axis]):
            fit = math.gcd(mesh.size, *(n for other, n, _ in cut if other == axis))
            nearest = min(divisors(fit), key=lambda n: abs(math.log(n / found)))
            raise InputError(
                f"mesh.{axis}: found {found}; expected a divisor of {size} ({name}), the nearest "
                f"that suits all being {nearest}"
            )
    return placed


def last_cut(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """fsdp along the last axis that it divides, or nothing where it divides none."""
    fits = [i for i, n in enumerate(shape) if n % mesh.shape.get("fsdp", 1) == 0]
    return PartitionSpec(*[None] * fits[-1], "fsdp") if fits else PartitionSpec()


def shapes_with_shardings(tree: Any, places: Any) -> Any:
    """Arrays or their shapes as shapes that know their shardings."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )


def in_host_memory(tree: Any) -> Any:
    """The same shardings in the host's memory."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST_MEMORY), tree)


def put_on_mesh(tree: Any, places: Any) -> Any:
    """Arrays that every process has whole, on their places of the mesh."""
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    def one(x, place):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    return jax.tree.map(one, tree, places)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices but those that share samples."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(sharding: NamedSharding, size: int) -> tuple[int, int]:
    """From and to which row of a batch the devices of this process hold samples."""
    parts = sharding.addressable_devices_indices_map((size,)).values()
    begins, ends, _ = zip(*(part[0].indices(size) for part in parts), strict=True)
    return min(begins), max(ends)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch: int, microbatch: int, mesh: Mesh) -> int:
    """The number of microbatches. Raises: InputError where the mesh does not divide one."""
    if microbatch <= 0 or batch % microbatch:
        raise InputError(f"microbatch: found {microbatch}; expected a divisor of batch ({batch})")
    if microbatch % (count := batch_shards(mesh)):
        raise InputError(
            f"microbatch: found {microbatch}; expected a multiple of the mesh's {count} shares "
            f"({' x '.join(BATCH_AXES)})"
        )
    return batch // microbatch
