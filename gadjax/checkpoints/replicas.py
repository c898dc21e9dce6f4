"""Silent corruption: devices that hold the same piece of the state have to hold the same bits.

No update fails where a bit flips in one device's copy of a parameter: the run goes on with devices
that compute with different networks. So the copies are compared before every save. What only one
device holds (every leaf on one device, a leaf that the mesh splits over all) has nothing to be
compared with.
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
    """Compare all copies; every process calls it, in the same order, and learns the same.

    Raises: RunStopped naming the leaf, the devices and the newest checkpoint; nothing is saved.
    """
    wrong = differing_leaves(state)
    if not wrong:
        return
    with suppress(SaveFailed):  # then it is one before
        checkpoints.wait()
    first = jax.process_index() == 0
    newest = broadcast_from_first(
        (latest_valid_step(checkpoints.folder)[0] if first else None) or 0
    )
    name, devices = next(iter(wrong.items()))
    held = ", ".join(f"device {d.id} (process {d.process_index})" for d in devices)
    more = f", and {len(wrong) - 1} more leaves that differ" if len(wrong) > 1 else ""
    raise RunStopped(
        f"step {step}: {name}: found other bits on {held} than on its replicas{more}; expected "
        f"the same on all; not saved, the newest sound checkpoint is {newest or 'none'}"
    )


def differing_leaves(state: PyTree) -> dict[str, list[jax.Device]]:
    """Path of every leaf whose copies differ -> the devices of those unlike most, or of all copies
    where there is no majority."""
    leaves = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
    leaves = {name: x for name, x in leaves.items() if _copies(x.sharding)}
    if not leaves:
        return {}
    mesh = next(iter(leaves.values())).sharding.mesh
    sums = [_sums(x, x.sharding) for x in leaves.values()]
    table = np.asarray(jax.jit(jnp.stack, out_shardings=replicated(mesh))(sums))
    found = {}
    for (name, x), row in zip(leaves.items(), table, strict=True):
        odd = _odd(row.reshape(mesh.devices.shape), _copies(x.sharding))
        if odd is not None:
            found[name] = list(mesh.devices[odd])
    return found


def _copies(place: NamedSharding) -> tuple[int, ...]:
    """The numbers of the mesh axes along which devices hold the same, those of one device apart."""
    used = {axis for part in place.spec for axis in (part if isinstance(part, tuple) else (part,))}
    sizes = enumerate(place.mesh.shape.items())
    return tuple(number for number, (axis, size) in sizes if size > 1 and axis not in used)


def _odd(sums: np.ndarray, axes: tuple[int, ...]) -> np.ndarray | None:
    """Which devices of the mesh hold what most of their replicas (along `axes`) do not."""
    last = tuple(range(-len(axes), 0))
    groups = np.moveaxis(sums, axes, last)
    flat = groups.reshape(*groups.shape[: -len(axes)], -1)
    if (flat == flat[..., :1]).all():
        return None
    same = (flat[..., :, None] == flat[..., None, :]).sum(-1)  # replicas with the same bits
    odd = (same < flat.shape[-1]) & (2 * same <= flat.shape[-1])
    return np.moveaxis(odd.reshape(groups.shape), last, axes)


@partial(jax.jit, static_argnums=1)
def _sums(x: jax.Array, place: NamedSharding) -> jax.Array:
    """A sum over the bits that each device holds, uint32 [devices], each sum where its bits are.

    One changed element always changes it, anything else but once in 2**32 times: elements are
    mixed with their positions, one to one, before they are added.
    """
    if place.memory_kind == HOST_MEMORY:
        x = jax.device_put(x, NamedSharding(place.mesh, place.spec))
    every = PartitionSpec(place.mesh.axis_names)
    return jax.shard_map(_sum, mesh=place.mesh, in_specs=place.spec, out_specs=every)(x)


def _sum(x: jax.Array) -> jax.Array:
    """Of one device's part; of four bytes an element, two, or one, as JAX holds them."""
    if x.dtype != bool:
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    words, position = x.astype(jnp.uint32), jnp.uint32(0)
    for axis, length in enumerate(words.shape):
        position = position * length + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = (words ^ (position * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)[None]
