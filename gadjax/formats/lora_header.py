"""Headers of LoRA files: tensors by module, settings in the metadata, kinds of adapters."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gadjax.errors import InputError, short_repr
from gadjax.formats.safetensors_file import Tensor, read_header_and_metadata
from gadjax.formats.sampling_config import SamplingConfig, parse_sampling
from gadjax.io.untrusted import is_number, parse_json, read_json

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SAMPLING = "gadjax"  # in the header's metadata: settings with which the adapted model is sampled
XLABS = r"(?<=_lora[12])"  # of a double block: 1 for the picture's tokens, 2 for the prompt's
# End of a key -> part of the adapter.
ENDS = (
    (r"\.lora_A(?:\.\w+)?\.weight", "A"),
    (r"\.lora_B(?:\.\w+)?\.weight", "B"),
    (rf"\.lora_down\.weight|[._]lora(?:_linear_layer)?\.down\.weight|{XLABS}\.down\.weight", "A"),
    (rf"\.lora_up\.weight|[._]lora(?:_linear_layer)?\.up\.weight|{XLABS}\.up\.weight", "B"),
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


class Settings(NamedTuple):
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


@dataclass(frozen=True)
class OpenLora:
    """Header of a LoRA's file.

    Attributes:
      path: the file.
      tensors: entries of the header.
      metadata: texts of the header.
      settings: of PEFT by network, "" for all.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    settings: dict[str, dict[str, Any]]

    def settings_of(self, component: str) -> Settings:
        """Settings of PEFT for a network."""
        return Settings(self.path, self.settings.get(component, self.settings.get("", {})))


def is_lora(path: Path) -> bool:
    """True for a safetensors file, or a folder with a LoRA of diffusers or PEFT."""
    names = DIFFUSERS_WEIGHTS, PEFT_CONFIG
    if path.is_dir():
        return any((path / name).is_file() for name in names)
    return path.suffix == ".safetensors" and path.is_file()


def open_lora(path: Path) -> "OpenLora":
    """Header of a safetensors file, or of the one in a folder of diffusers or PEFT.

    Raises: InputError for another file, or settings that change more than a LoRA's scale.
    """
    settings: dict[str, Any] = {}
    if path.is_dir() and (path / DIFFUSERS_WEIGHTS).exists():
        path = path / DIFFUSERS_WEIGHTS
    elif path.is_dir():
        settings = {"": read_json(path / PEFT_CONFIG)}
        _check_settings(path / PEFT_CONFIG, settings[""])
        path = path / PEFT_WEIGHTS
    tensors, metadata = read_header_and_metadata(path)
    return OpenLora(path, tensors, metadata, settings or _metadata_settings(path, metadata))


def other_kinds(keys: Iterable[str]) -> dict[str, str]:
    """Kinds of adapters beside LoRA to which keys of a file belong, with the first key of one."""
    kinds: dict[str, str] = {}
    for key in keys:
        for pattern, kind in OTHER_KINDS:
            if re.search(pattern, key):
                kinds.setdefault(kind, key)
    return kinds


def split_key(key: str) -> tuple[str, str] | None:
    """Module's spelling and part ("A", "B" or "alpha") of a key; None for another key."""
    for end, part in ENDS:
        if match := re.fullmatch(rf"(.*?)(?:{end})", key):
            return match[1], part
    return None


def sampling_of(path: Path, metadata: Mapping[str, str]) -> SamplingConfig | None:
    """Sampling settings in a header's metadata; None without any."""
    if SAMPLING not in metadata:
        return None
    entries = _parsed(path, SAMPLING, metadata[SAMPLING])
    return parse_sampling(path, entries, SamplingConfig())


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


def _parsed(path: Path, name: str, text: str) -> dict[str, Any]:
    """The JSON object of a text of the header's metadata."""
    try:
        value = parse_json(text.encode())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path}: found metadata {name} that is no JSON object; expected one")
    return value
