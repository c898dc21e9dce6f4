"""8-bit kernels of a frozen network: which ones, and their sharding."""

import re
from collections.abc import Sequence

from jax.sharding import PartitionSpec

from gadjax.errors import InputError, short_repr
from gadjax.models.adapters import adaptable
from gadjax.models.params import flatten, unflatten
from gadjax.ops.linear import quantize
from gadjax.types import Params


def quantized(params: Params, pattern: str) -> Params:
    """Parameters of a network with some kernels in 8 bits; "" for none.

    Args:
      params: NumPy arrays, or their shapes.
      pattern: regex that matches anywhere in the path of such a kernel.

    Raises: InputError for a pattern that is no regex, or matches no kernel.
    """
    if not pattern:
        return params
    kernels = adaptable(params)
    try:
        chosen = {path for path in kernels if re.search(pattern, path)}
    except (re.error, TypeError) as error:
        raise InputError(f"int8: found {short_repr(pattern)} ({error}); expected a regex") from None
    if not chosen:
        raise InputError(
            f"int8: found {short_repr(pattern)}, which matches none of {len(kernels)} kernels; "
            f"expected a regex of paths such as {next(iter(kernels))}"
        )
    flat = flatten(params)
    return unflatten({k: quantize(v) if k in chosen else v for k, v in flat.items()})


def quantized_rules(
    rules: Sequence[tuple[str, PartitionSpec]],
) -> tuple[tuple[str, PartitionSpec], ...]:
    """Sharding rules of 8-bit kernels: values as the kernel, scales along its outputs.

    rules: of the network's parameters.
    """
    derived = []
    for pattern, spec in rules:
        if not pattern.endswith("kernel$"):
            continue
        *before, _, outputs = spec
        stem, layers = pattern.removesuffix("$"), before[: len(before) % 2]
        derived.append((rf"{stem}/values$", spec))
        derived.append((rf"{stem}/scales$", PartitionSpec(*layers, outputs)))
    return (*derived, (r"/kernel/scales$", PartitionSpec()))
