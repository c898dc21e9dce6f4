"""LoRA out of a difference of weights, by singular value decomposition of the kernels' differences.

The factors are U sqrt(S) and sqrt(S) V^T of the largest singular values, in float32, not clamped:
clamping at a quantile, as other extractors do, is an error of its own.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import Component
from gadjax.formats.lora_names import layers_of
from gadjax.formats.lora_writer import Pair
from gadjax.formats.state_dict import kernel_to_torch
from gadjax.models.params import flatten

# Rounding error, relative to the magnitude, of numbers that fill each binade evenly: the root mean
# square of a uniform error of half a unit in the last place.
ROUNDING = 1 / math.sqrt(12) * 3 / 4


class LayerError(NamedTuple):
    """Error of one layer.

    Attributes:
      module: name in diffusers.
      size: Frobenius norm of the difference.
      error: norm of what the factors leave out, relative to `size`.
      noise: largest singular value that rounding of the two weights explains, relative to `size`.
    """

    module: str
    size: float
    error: float
    noise: float


class Difference(NamedTuple):
    """LoRA of a difference.

    Attributes:
      pairs: factors by module, all of one rank.
      layers: error of every layer that has factors.
      left_out: parameters that differ and have no factors, by path -> norm of their difference.
    """

    pairs: dict[str, Pair]
    layers: list[LayerError]
    left_out: dict[str, float]

    @property
    def rank(self) -> int:
        return len(next(iter(self.pairs.values())).a)

    @property
    def error(self) -> float:
        """Norm of what the LoRA leaves out of the difference, relative to it."""
        rest = sum((e.size * e.error) ** 2 for e in self.layers)
        rest += sum(size**2 for size in self.left_out.values())
        total = sum(e.size**2 for e in self.layers) + sum(x**2 for x in self.left_out.values())
        return math.sqrt(rest / total)


def extract_difference(
    before: Component, after: Component, rank: int | None, energy: float | None
) -> Difference:
    """Low-rank factors of every kernel in which two networks differ.

    Args:
      before: network with parameters.
      after: network of the same configuration, with other parameters.
      rank: of all factors; None: by `energy`.
      energy: share of the kernels' squared difference that the smallest sufficient rank keeps, over
        all layers together.

    Raises: InputError for networks without such a difference.
    """
    kernels = dict(_differences(before, after))
    if not kernels:
        raise InputError(
            f"{after.weights.folder}: found no kernel unlike that in {before.weights.folder}; "
            "expected weights that were trained on from there"
        )
    rank = rank or _smallest_rank(kernels, energy)
    pairs, layers = {}, []
    for module, (delta, shape, floor) in kernels.items():
        pairs[module], rest = _factors(delta, shape, rank)
        size = float(np.linalg.norm(delta))
        layers.append(LayerError(module, size, rest / size, floor / size))
    return Difference(pairs, layers, _left_out(before, after))


def _differences(before: Component, after: Component) -> Iterator[tuple[str, tuple]]:
    """Yield module, (difference [out, in * H * W], torch's shape, singular value of rounding)."""
    old, new = flatten(before.params), flatten(after.params)
    for module, (path, index, shape) in layers_of(before).items():
        a, b = (np.asarray(x[path] if index is None else x[path][index]) for x in (old, new))
        delta = kernel_to_torch(b.astype(np.float32) - a.astype(np.float32)).reshape(shape[0], -1)
        if delta.any():
            sides = sum(map(math.sqrt, delta.shape))
            error = math.hypot(*(_rounding(x) for x in (a, b)))
            yield module, (delta, shape, error * sides)


def _rounding(weight: np.ndarray) -> float:
    """Root mean square of the rounding error of a weight in its dtype."""
    size = float(np.sqrt(np.mean(np.square(weight.astype(np.float32)))))
    return ROUNDING * float(jnp.finfo(weight.dtype).eps) * size


def _smallest_rank(kernels: dict[str, tuple], energy: float | None) -> int:
    """Smallest rank that keeps a share of the squared singular values of all kernels together."""
    values = [np.linalg.svd(delta, compute_uv=False) for delta, *_ in kernels.values()]
    sums = np.zeros(max(map(len, values)))
    for squared in (np.square(x.astype(np.float64)) for x in values):
        sums[: len(squared)] += squared
    kept = np.cumsum(sums) / sums.sum()
    return int(np.searchsorted(kept, energy * (1 - 1e-9))) + 1


def _factors(delta: np.ndarray, shape: tuple[int, ...], rank: int) -> tuple[Pair, float]:
    """Factors of a difference [out, in * H * W], and the norm of what they leave out.

    Factors of a kernel with a smaller side than the rank are filled with zeros: readers take the
    rank of one module for all.
    """
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    rest = float(np.sqrt(np.square(s[rank:].astype(np.float64)).sum()))
    root = np.sqrt(s[:rank])
    b, a = u[:, :rank] * root, root[:, None] * v[:rank]
    missing = rank - len(root)
    b, a = np.pad(b, ((0, 0), (0, missing))), np.pad(a, ((0, missing), (0, 0)))
    sides = (1,) * len(shape[2:])
    return Pair(a.reshape(rank, *shape[1:]), b.reshape(shape[0], rank, *sides)), rest


def _left_out(before: Component, after: Component) -> dict[str, float]:
    old, new = flatten(before.params), flatten(after.params)
    adaptable = {layer.path for layer in layers_of(before).values()}
    sizes = {
        path: float(np.linalg.norm((new[path].astype(np.float32) - x.astype(np.float32)).ravel()))
        for path, x in old.items()
        if path not in adaptable
    }
    return {path: size for path, size in sizes.items() if size}
