"""LoRA files: adapters that diffusers, PEFT, kohya and ComfyUI wrote, and our own.

W [out, in] becomes W + s B A with A [r, in], B [out, r] in torch's layout. A module's s is alpha /
r where the file has an alpha for it, else what the metadata of PEFT implies, else 1; diffusers and
ComfyUI read it so. Every tensor of a file is used or the file is refused.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gadjax.errors import InputError, short_repr
from gadjax.formats.diffusers_folder import PipelineFolder
from gadjax.formats.lora_names import Layer, Place, adapted_parts, layers_of, places
from gadjax.formats.safetensors_file import Tensor, read_header_and_metadata
from gadjax.formats.sampling_config import SamplingConfig, parse_sampling
from gadjax.formats.state_dict import MAX_LISTED, all_finite, kernel_from_torch
from gadjax.io.untrusted import is_number, parse_json, read_json
from gadjax.models.params import flatten, unflatten
from gadjax.types import Params

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SAMPLING = "gadjax"  # in the header's metadata: settings with which the adapted model is sampled
# End of a key -> part of the adapter.
ENDS = (
    (r"\.lora_A(?:\.\w+)?\.weight", "A"),
    (r"\.lora_B(?:\.\w+)?\.weight", "B"),
    (r"\.lora_down\.weight|[._]lora(?:_linear_layer)?\.down\.weight", "A"),
    (r"\.lora_up\.weight|[._]lora(?:_linear_layer)?\.up\.weight", "B"),
    (r"\.alpha", "alpha"),
)
# What a key contains -> the kind of adapter, which is refused by this name.
OTHER_KINDS = (
    (r"lora_magnitude_vector|dora_scale", "DoRA"),
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.lora_mid\.", "a LoCon with a Tucker core"),
    (r"\.lora_[AB](\.\w+)?\.bias$", "a LoRA with biases"),
    (r"\.(diff|diff_b|set_weight|w_norm|b_norm|reshape_weight)$", "whole differences of weights"),
    (r"\.(oft|boft)_|oft_blocks|oft_diag", "OFT"),
    (r"\.(a1|a2|b1|b2)\.weight$|glora", "GLoRA"),
)


# Settings of PEFT that change more than the scale, with their values in a plain LoRA.
USUAL = {
    "peft_type": "LORA",
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "fan_in_fan_out": False,
}


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


def read_lora(path: Path, folder: PipelineFolder) -> LoraFile:
    """Read the adapters of a safetensors file, or of a folder of diffusers or PEFT.

    Args:
      path: the file or folder.
      folder: the pipeline that is adapted.

    Raises: InputError for another kind of adapter, named; for a tensor that belongs to no module;
      and for one of another shape, that is not finite, or without its other half.
    """
    settings: dict[str, Any] = {}
    if path.is_dir() and (path / DIFFUSERS_WEIGHTS).exists():
        path = path / DIFFUSERS_WEIGHTS
    elif path.is_dir():
        settings = {"": read_json(path / PEFT_CONFIG)}
        _check_settings(path / PEFT_CONFIG, settings[""])
        path = path / PEFT_WEIGHTS
    tensors, metadata = read_header_and_metadata(path)
    _refuse_other_kinds(path, tensors)
    settings = settings or _metadata_settings(path, metadata)
    layers = {name: layers_of(part) for name, part in adapted_parts(folder).items()}
    groups = _grouped(path, tensors, places(folder, layers))
    factors: dict[str, dict[str, Factors]] = {}
    for stem, (place, parts) in groups.items():
        scale_of = settings.get(place.component, settings.get("", None))
        adapter = _factors(path, stem, parts, _Settings(path, scale_of or {}))
        known = factors.setdefault(place.component, {})
        for module, piece in _pieces(path, stem, place, layers[place.component], adapter):
            if module in known:
                raise InputError(f"{path}: found two adapters of {module}; expected one")
            known[module] = piece
    return LoraFile(path, factors, _sampling(path, metadata))


def _refuse_other_kinds(path: Path, keys: Mapping[str, Any]) -> None:
    for key in keys:
        for pattern, kind in OTHER_KINDS:
            if re.search(pattern, key):
                raise InputError(
                    f"{path}: found {kind} ({short_repr(key)}); expected a LoRA of matrices A and B"
                )


def _grouped(
    path: Path, tensors: Mapping[str, Tensor], spelt: Mapping[str, Place]
) -> dict[str, tuple[Place, dict[str, Tensor]]]:
    """Tensors of each adapter by part, by the module's spelling in the file."""
    groups: dict[str, tuple[Place, dict[str, Tensor]]] = {}
    unknown = []
    for key, tensor in tensors.items():
        matches = ((re.fullmatch(rf"(.*?)(?:{end})", key), part) for end, part in ENDS)
        match, part = next(((m, part) for m, part in matches if m), (None, ""))
        place = spelt.get(match[1]) if match else None
        if place is None:
            unknown.append(key)
            continue
        parts = groups.setdefault(match[1], (place, {}))[1]
        if part in parts:
            raise InputError(f"{path}: found two tensors {part} of {match[1]}; expected one")
        parts[part] = tensor
    if unknown or not groups:
        listed = ", ".join(map(short_repr, unknown[:MAX_LISTED])) or "no tensor"
        more = ", ..." if len(unknown) > MAX_LISTED else ""
        raise InputError(
            f"{path}: found {len(unknown)} of {len(tensors)} tensors that belong to no module of "
            f"the pipeline ({listed}{more}); expected a LoRA for its networks"
        )
    return groups


class _Settings(NamedTuple):
    """Settings of PEFT for one network, from a file's metadata or from adapter_config.json."""

    path: Path
    values: Mapping[str, Any]

    def scale(self, module: str, rank: int) -> float:
        """Factor of a module's adapter by these settings; 1 without any."""
        values = self.values
        if "lora_alpha" not in values:
            return 1.0
        alpha = self._of(module, "alpha_pattern", values["lora_alpha"])
        if not (is_number(alpha) and alpha > 0):
            raise InputError(
                f"{self.path}: found an alpha of {short_repr(alpha)} for {module}; expected a "
                "positive number"
            )
        return alpha / (math.sqrt(rank) if values.get("use_rslora") is True else rank)

    def _of(self, module: str, patterns: str, default: Any) -> Any:
        """Value for a module: of the pattern that is the end of its name, or the default."""
        table = self.values.get(patterns) or {}
        if not isinstance(table, dict):
            raise InputError(f"{self.path}: found {patterns} = {short_repr(table)}; expected names")
        for name, value in table.items():
            # Patterns are names in practice; as regexes they could take for ever.
            if module == name.lstrip("^") or module.endswith(f".{name}"):
                return value
        return default


def _metadata_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Settings by network from the header's "lora_adapter_metadata"; "" for all networks.

    Raises: InputError for settings that change more than a LoRA's scale.
    """
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    settings: dict[str, dict[str, Any]] = {}
    for name, value in _parsed(path, "lora_adapter_metadata", text).items():
        match = re.match(r"(unet|transformer|text_encoder(?:_\d)?)\.", name)
        component = match[1] if match else ""
        settings.setdefault(component, {})[name.removeprefix(f"{component}.")] = value
    for values in settings.values():
        _check_settings(path, values)
    return settings


def _check_settings(path: Path, values: Mapping[str, Any]) -> None:
    for key, usual in USUAL.items():
        if values.get(key) not in (usual, None):
            raise InputError(
                f"{path}: found {key} = {short_repr(values[key])}; expected {usual!r}, a LoRA of "
                "matrices A and B"
            )


def _factors(path: Path, stem: str, parts: Mapping[str, Tensor], settings: _Settings) -> Factors:
    """Read one adapter. stem: name of its module in the file."""
    if not parts.keys() >= {"A", "B"}:
        raise InputError(
            f"{path}: found only {', '.join(sorted(parts))} of {stem}; expected both A and B"
        )
    arrays = {}
    for part, tensor in parts.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise InputError(f"{path}: found {part} of {stem} of {tensor.dtype}; expected floats")
        arrays[part] = tensor.read().astype(np.float32)
        if not all_finite(arrays[part]):
            raise InputError(f"{path}: found NaN or infinity in {part} of {stem}; expected none")
    a, b, alpha = arrays["A"], arrays["B"], arrays.get("alpha")
    if a.ndim < 2 or b.ndim < 2 or not len(a) or b.shape[1] != len(a):
        raise InputError(
            f"{path}: found A {a.shape} and B {b.shape} of {stem}; expected [r, in] and [out, r]"
        )
    if alpha is None:
        return Factors(a, b, settings.scale(stem, len(a)))
    if alpha.size != 1 or not is_number(value := float(alpha.reshape(()))) or value <= 0:
        raise InputError(
            f"{path}: found alpha {short_repr(alpha.tolist())} of {stem}; expected a number above 0"
        )
    return Factors(a, b, value / len(a))


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


def _sampling(path: Path, metadata: Mapping[str, str]) -> SamplingConfig | None:
    if SAMPLING not in metadata:
        return None
    entries = _parsed(path, SAMPLING, metadata[SAMPLING])
    return parse_sampling(path, entries, SamplingConfig())


def _parsed(path: Path, name: str, text: str) -> dict[str, Any]:
    """The JSON object of a text of the header's metadata."""
    try:
        value = parse_json(text.encode())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path}: found metadata {name} that is no JSON object; expected one")
    return value


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
