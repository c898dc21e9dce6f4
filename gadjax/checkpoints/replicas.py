"""Replica check against silent data corruption: replicas of a leaf must be bit-identical.

No update fails when a bit flips in one device's replica of a parameter: the run continues with
devices that compute with different networks. So replicas are compared before every save. A shard
that only one device holds (every leaf on one device, a leaf sharded over the whole mesh) cannot be
checked.
"""

from contextlib import suppress
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gadjax.checkpoints.checkpoint import Checkpoints, SaveFailed
from gadjax.checkpoints.steps import latest_valid_step
from gadjax.errors import RunStopped
from gadjax.parallel.sharding import HOST_MEMORY, path_name, replicated
from gadjax.runtime.distributed import broadcast_from_first
from gadjax.types import PyTree


def check_replicas(state: PyTree, step: int, checkpoints: Checkpoints) -> None:
    """Compare all replicas of the state before a save.

    Every process must call it, in the same order; all get the same result.

    Args:
      state: training state, sharded.
      step: number of the step, for the error text.
      checkpoints: the run's checkpoints.

    Raises: RunStopped naming the leaf, the devices and the latest valid checkpoint; then nothing is
      saved.
    """
    differing = differing_leaves(state)
    if not differing:
        return
    with suppress(SaveFailed):  # then the latest one is an earlier step
        checkpoints.wait()
    first = jax.process_index() == 0
    newest = broadcast_from_first(
        (latest_valid_step(checkpoints.folder)[0] if first else None) or 0
    )
    name, devices = next(iter(differing.items()))
    listed = ", ".join(f"device {d.id} (process {d.process_index})" for d in devices)
    more = f", and {len(differing) - 1} more leaves that differ" if len(differing) > 1 else ""
    raise RunStopped(
        f"step {step}: {name}: found other bits on {listed} than on its replicas{more}; expected "
        f"the same on all; not saved, the latest valid checkpoint is {newest or 'none'}"
    )


def differing_leaves(state: PyTree) -> dict[str, list[jax.Device]]:
    """Leaves whose replicas differ, by path, with the devices of the replicas in the minority.

    Without a majority these are the devices of all replicas.
    """
    leaves = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
    leaves = {name: x for name, x in leaves.items() if _replicated_axes(x.sharding)}
    if not leaves:
        return {}
    mesh = next(iter(leaves.values())).sharding.mesh
    sums = [_sums(x, x.sharding) for x in leaves.values()]
    table = np.asarray(jax.jit(jnp.stack, out_shardings=replicated(mesh))(sums))
    differing = {}
    for (name, x), row in zip(leaves.items(), table, strict=True):
        minority = _minority(row.reshape(mesh.devices.shape), _replicated_axes(x.sharding))
        if minority is not None:
            differing[name] = list(mesh.devices[minority])
    return differing


def _replicated_axes(sharding: NamedSharding) -> tuple[int, ...]:
    """Indices of the mesh axes of more than one device along which a leaf is replicated."""
    used = {
        axis for part in sharding.spec for axis in (part if isinstance(part, tuple) else (part,))
    }
    sizes = enumerate(sharding.mesh.shape.items())
    return tuple(number for number, (axis, size) in sizes if size > 1 and axis not in used)


def _minority(sums: np.ndarray, axes: tuple[int, ...]) -> np.ndarray | None:
    """Mask of the mesh's devices whose sum is not that of most replicas along `axes`, or None."""
    last = tuple(range(-len(axes), 0))
    groups = np.moveaxis(sums, axes, last)
    flat = groups.reshape(*groups.shape[: -len(axes)], -1)
    if (flat == flat[..., :1]).all():
        return None
    same = (flat[..., :, None] == flat[..., None, :]).sum(-1)  # replicas with the same bits
    minority = (same < flat.shape[-1]) & (2 * same <= flat.shape[-1])
    return np.moveaxis(minority.reshape(groups.shape), last, axes)


@partial(jax.jit, static_argnums=1)
def _sums(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Checksum of each device's shard, uint32 [devices], each on its device.

    One changed element always changes the checksum; other changes are missed once in 2**32 times:
    elements are mixed with their positions by a bijection before they are added.
    """
    if sharding.memory_kind == HOST_MEMORY:
        x = jax.device_put(x, NamedSharding(sharding.mesh, sharding.spec))
    all_axes = PartitionSpec(sharding.mesh.axis_names)
    return jax.shard_map(_sum, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=all_axes)(x)


def _sum(x: jax.Array) -> jax.Array:
    """Checksum of one device's shard, whose elements have one, two or four bytes."""
    if x.dtype != bool:
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    words, position = x.astype(jnp.uint32), jnp.uint32(0)
    for axis, length in enumerate(words.shape):
        position = position * length + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = (words ^ (position * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)[None]
