"""Low-rank adapters of a network: which kernels have one, initial values, shardings, merging."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gadjax.errors import InputError, short_repr
from gadjax.models.params import cast, flatten, merge_params, unflatten
from gadjax.ops.linear import Adapter, LowRank, dense
from gadjax.types import Params

# Attention and feed-forward layers of every family, not their modulation or embeddings.
TARGETS = r"/(attn|ff)\w*/"


@dataclass(frozen=True)
class Lora:
    """Settings of a network's adapters.

    Attributes:
      rank: r of each.
      alpha: factor of each, divided by the rank; None: the rank, a factor of 1.
      targets: regex that matches anywhere in the path of a kernel that has an adapter.
    """

    rank: int
    alpha: float | None = None
    targets: str = TARGETS

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def adaptable(params: Params) -> dict[str, Any]:
    """Kernels that an adapter fits, by path: of linear layers, and of convolutions without groups.

    params: of a network, or their shapes.
    """
    kernels = {path: leaf for path, leaf in flatten(params).items() if path.endswith("kernel")}
    # A depthwise convolution has one input channel a group.
    return {path: leaf for path, leaf in kernels.items() if leaf.shape[-2] > 1}


def abstract_adapters(abstract: Params, lora: Lora) -> Params:
    """Adapters of a network as float32 shapes, nested at the paths of their kernels.

    Args:
      abstract: shapes of the network's parameters.
      lora: settings.

    Raises: InputError where the targets match no kernel.
    """
    kernels = adaptable(abstract)
    flat = {
        path: _adapter_shapes(leaf.shape, lora)
        for path, leaf in kernels.items()
        if re.search(lora.targets, path)
    }
    if not flat:
        raise InputError(
            f"lora.targets: found {short_repr(lora.targets)}, which matches none of "
            f"{len(kernels)} kernels; expected a regex of paths such as {next(iter(kernels))}"
        )
    return unflatten(flat)


def _split_shape(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shape of a kernel as (layers,), (height, width) and (inputs, outputs).

    Of a linear layer [in, out] without the second, and of one outside a stack without the first.
    """
    layers = len(shape) % 2
    return shape[:layers], shape[layers:-2], shape[-2:]


def _adapter_shapes(shape: tuple[int, ...], lora: Lora) -> Adapter:
    layers, sides, (inputs, outputs) = _split_shape(tuple(shape))
    a = (*layers, *sides, inputs, lora.rank)
    b = (*layers, *(1 for _ in sides), lora.rank, outputs)
    return Adapter(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in (a, b)), lora.scale)


def is_adapter(leaf: Any) -> bool:
    return isinstance(leaf, Adapter)


def init_adapters(key: jax.Array, abstract: Params) -> Params:
    """Initial adapters: a uniform in +-1/sqrt(inputs), b zero, so that nothing is changed yet.

    As PEFT's default. Args: key; abstract: of `abstract_adapters`.
    """
    adapters, structure = jax.tree.flatten(abstract, is_leaf=is_adapter)

    def init(key: jax.Array, adapter: Adapter) -> Adapter:
        a, b = adapter.a, adapter.b
        _, sides, (inputs, _) = _split_shape(a.shape)
        bound = 1 / math.sqrt(math.prod(sides) * inputs)
        return Adapter(
            jax.random.uniform(key, a.shape, a.dtype, -bound, bound),
            jnp.zeros(b.shape, b.dtype),
            adapter.scale,
        )

    keys = jax.random.split(key, len(adapters))
    return structure.unflatten(map(init, keys, adapters))


def adapter_rules(
    rules: Sequence[tuple[str, PartitionSpec]],
) -> tuple[tuple[str, PartitionSpec], ...]:
    """Sharding rules of adapters: a along its kernel's inputs, b along its outputs.

    rules: of the network's parameters.
    """
    derived = []
    for pattern, spec in rules:
        if not pattern.endswith("kernel$"):
            continue
        *before, inputs, outputs = spec
        stem = pattern.removesuffix("$")
        derived.append((rf"{stem}/a$", PartitionSpec(*before, inputs, None)))
        derived.append((rf"{stem}/b$", PartitionSpec(*before, None, outputs)))
    return (*derived, (r"/kernel/[ab]$", PartitionSpec()))


def adapters_from_arrays(arrays: Params, scale: float) -> Params:
    """Adapters of the nested arrays in which a checkpoint has them.

    Args:
      arrays: nested dicts with the leaves KERNEL/a and KERNEL/b.
      scale: of all adapters.

    Raises: InputError for other leaves.
    """
    flat: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten(arrays).items():
        kernel, _, name = path.rpartition("/")
        flat.setdefault(kernel, {})[name] = leaf
    for kernel, parts in flat.items():
        if parts.keys() != {"a", "b"}:
            raise InputError(f"{kernel}: found {', '.join(sorted(parts))}; expected a and b")
    return unflatten({kernel: Adapter(p["a"], p["b"], scale) for kernel, p in flat.items()})


def adapted(base: Params, adapters: Params) -> Params:
    """Parameters of a network with their adapters, unmerged.

    Raises: InputError for an adapter of a kernel that the network does not have in this shape.
    """
    kernels = adaptable(base)
    for path, adapter in flatten(adapters).items():
        if path not in kernels:
            raise InputError(f"{path}: found an adapter; expected one of {len(kernels)} kernels")
        expected = _adapter_shapes(kernels[path].shape, Lora(adapter.rank))
        shapes, expected = (tuple(x.shape for x in (e.a, e.b)) for e in (adapter, expected))
        if shapes != expected:
            raise InputError(f"{path}: found an adapter of shapes {shapes}; expected {expected}")
    return merge_params(adapters, base)


def merged(base: Params, adapters: Params) -> Params:
    """Parameters of a network with their adapters added to the kernels, in float32.

    Args:
      base: NumPy arrays in any dtype; all are cast to float32.
      adapters: as `adapted` takes them.
    """
    params = cast(adapted(base, adapters), jnp.float32)
    return jax.tree.map(dense, params, is_leaf=lambda leaf: isinstance(leaf, LowRank))
