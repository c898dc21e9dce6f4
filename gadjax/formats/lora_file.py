"""LoRA files: adapters that diffusers, PEFT, kohya and ComfyUI wrote, and our own.

W [out, in] becomes W + s B A with A [r, in], B [out, r] in torch's layout. A module's s is alpha /
r where the file has an alpha for it, else what the metadata of PEFT implies, else 1; diffusers and
ComfyUI read it so. Every tensor of a file is used or the file is refused.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gadjax.errors import InputError, short_repr
from gadjax.formats.diffusers_folder import PipelineFolder
from gadjax.formats.lora_header import (
    Settings,
    open_lora,
    other_kinds,
    sampling_of,
    split_key,
)
from gadjax.formats.lora_names import Layer, Place, adapted_parts, layers_of, places
from gadjax.formats.safetensors_file import Tensor
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.formats.state_dict import MAX_LISTED, all_finite, kernel_from_torch
from gadjax.io.untrusted import is_number
from gadjax.models.params import flatten, unflatten
from gadjax.types import Params


class Factors(NamedTuple):
    """Adapter of one module: s B A, in float32 and torch's layout."""

    a: np.ndarray  # [r, in] or [r, in, H, W]
    b: np.ndarray  # [out, r] or [out, r, 1, 1]
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """Adapters of a file.

    Attributes:
      path: the file.
      factors: adapters by network and module, under diffusers' names.
      sampling: settings with which the adapted model is sampled; None if the file has none.
    """

    path: Path
    factors: dict[str, dict[str, Factors]]
    sampling: SamplingConfig | None = None


def parse_lora_flag(text: str) -> tuple[Path, float]:
    """File and weight of FILE[:WEIGHT], 1 without one.

    Raises: InputError for a weight that is no number.
    """
    name, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not name or not is_number(value):
        raise InputError(f"--lora: found {short_repr(text)}; expected FILE or FILE:WEIGHT")
    return Path(name), value


def read_lora(path: Path, folder: PipelineFolder, *, values: bool = True) -> LoraFile:
    """Read the adapters of a safetensors file, or of a folder of diffusers or PEFT.

    Args:
      path: the file or folder.
      folder: the pipeline that is adapted; its parameters may be shapes.
      values: False: the header alone, zeros in place of numbers and a scale of 1.

    Raises: InputError for another kind of adapter, named; for a tensor that belongs to no module;
      and for one of another shape, that is not finite, or without its other half.
    """
    opened = open_lora(path)
    path = opened.path
    if kinds := other_kinds(opened.tensors):
        kind, key = next(iter(kinds.items()))
        raise InputError(
            f"{path}: found {kind} ({short_repr(key)}); expected a LoRA of matrices A and B"
        )
    layers = {name: layers_of(part) for name, part in adapted_parts(folder).items()}
    groups = _grouped(path, opened.tensors, places(folder, layers))
    factors: dict[str, dict[str, Factors]] = {}
    for stem, (place, parts) in groups.items():
        settings = opened.settings_of(place.component)
        adapter = _factors(path, stem, parts, settings) if values else _zeros(path, stem, parts)
        known = factors.setdefault(place.component, {})
        for module, piece in _pieces(path, stem, place, layers[place.component], adapter):
            if module in known:
                raise InputError(f"{path}: found two adapters of {module}; expected one")
            known[module] = piece
    return LoraFile(path, factors, sampling_of(path, opened.metadata))


def _grouped(
    path: Path, tensors: Mapping[str, Tensor], spelt: Mapping[str, Place]
) -> dict[str, tuple[Place, dict[str, Tensor]]]:
    """Tensors of each adapter by part, by the module's spelling in the file."""
    groups: dict[str, tuple[Place, dict[str, Tensor]]] = {}
    unknown = []
    for key, tensor in tensors.items():
        stem, part = split_key(key) or ("", "")
        place = spelt.get(stem)
        if place is None:
            unknown.append(key)
            continue
        parts = groups.setdefault(stem, (place, {}))[1]
        if part in parts:
            raise InputError(f"{path}: found two tensors {part} of {stem}; expected one")
        parts[part] = tensor
    if unknown or not groups:
        listed = ", ".join(map(short_repr, unknown[:MAX_LISTED])) or "no tensor"
        more = ", ..." if len(unknown) > MAX_LISTED else ""
        raise InputError(
            f"{path}: found {len(unknown)} of {len(tensors)} tensors that belong to no module of "
            f"the pipeline ({listed}{more}); expected a LoRA for its networks"
        )
    return groups


def _factors(path: Path, stem: str, parts: Mapping[str, Tensor], settings: Settings) -> Factors:
    """Read one adapter. stem: name of its module in the file."""
    _zeros(path, stem, parts)  # refuses what does not fit before it is read
    arrays = {part: tensor.read().astype(np.float32) for part, tensor in parts.items()}
    for part, array in arrays.items():
        if not all_finite(array):
            raise InputError(f"{path}: found NaN or infinity in {part} of {stem}; expected none")
    a, b, alpha = arrays["A"], arrays["B"], arrays.get("alpha")
    if alpha is None:
        return Factors(a, b, settings.scale(stem, len(a)))
    if alpha.size != 1 or not is_number(value := float(alpha.reshape(()))) or value <= 0:
        raise InputError(
            f"{path}: found alpha {short_repr(alpha.tolist())} of {stem}; expected a number above 0"
        )
    return Factors(a, b, value / len(a))


def _zeros(path: Path, stem: str, parts: Mapping[str, Tensor]) -> Factors:
    """Zeros, which take no memory, in the shapes of an adapter's matrices; arguments as above."""
    if not parts.keys() >= {"A", "B"}:
        raise InputError(
            f"{path}: found only {', '.join(sorted(parts))} of {stem}; expected both A and B"
        )
    for part, tensor in parts.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise InputError(f"{path}: found {part} of {stem} of {tensor.dtype}; expected floats")
    a, b = parts["A"].shape, parts["B"].shape
    if min(len(a), len(b)) < 2 or 0 in (*a, *b) or b[1] != a[0]:
        raise InputError(f"{path}: found A {a} and B {b} of {stem}; expected [r, in] and [out, r]")
    return Factors(*(np.broadcast_to(np.float32(0), shape) for shape in (a, b)), 1.0)


def _pieces(path: Path, stem: str, place: Place, layers: Mapping[str, Layer], adapter: Factors):
    """Yield (module, its adapter): the rows of B that are the module's, with all of A.

    Args:
      path: the file.
      stem: name of the module in the file.
      place: what it stands for.
      layers: modules of the network.
      adapter: of the file's module.
    """
    a, b, scale = adapter
    if place.original.swapped:
        b = np.concatenate(np.split(b, 2)[::-1]) if len(b) % 2 == 0 else b
    modules = place.original.modules
    shapes = [layers[module].shape for module in modules]
    expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    fits = len(b) == expected[0] and _inputs(a.shape) == _inputs(expected)
    if not fits or math.prod(b.shape[2:]) != 1:
        raise InputError(
            f"{path}: found A {a.shape} and B {b.shape} of {stem}; expected a product {expected}"
        )
    starts = np.cumsum([shape[0] for shape in shapes])[:-1]
    for module, rows in zip(modules, np.split(b, starts), strict=True):
        yield module, Factors(a, rows, scale)


def _inputs(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes after the first; of a 1x1 convolution, which may be in a file as a matrix, one."""
    inputs = shape[1:]
    return inputs[:1] if math.prod(inputs[1:]) == 1 else inputs


def add_factors(
    params: Params, layers: Mapping[str, Layer], factors: Mapping[str, Factors], weight: float
) -> Params:
    """Parameters with adapters merged, in float32; the other parameters are not copied.

    Args:
      params: NumPy arrays of a network.
      layers: its modules, as `layers_of` returns them.
      factors: adapters by module.
      weight: factor of all of them.
    """
    flat, changed = dict(flatten(params)), set()
    for module, (a, b, scale) in factors.items():
        path, index, shape = layers[module]
        if path not in changed:
            flat[path] = np.array(flat[path], np.float32)
            changed.add(path)
        product = (b.reshape(len(b), -1) @ a.reshape(len(a), -1)).reshape(shape)
        target = flat[path] if index is None else flat[path][index]
        target += np.float32(weight * scale) * kernel_from_torch(product)
    return unflatten(flat)
