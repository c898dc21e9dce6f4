"""Registry of networks: a diffusers or transformers class and its config.json -> its port here."""

import functools
import importlib
import math
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax

from gadjax.errors import InputError, short_repr
from gadjax.models.family import Family, TextEncoder
from gadjax.models.module import functional
from gadjax.types import Params

# Class in model_index.json and config.json -> the module with its FAMILY, imported on first use.
COMPONENTS = {
    "UNet2DConditionModel": "gadjax.models.unet",
    "PixArtTransformer2DModel": "gadjax.models.pixart",
    "Transformer2DModel": "gadjax.models.pixart",
    "SanaTransformer2DModel": "gadjax.models.sana",
    "SD3Transformer2DModel": "gadjax.models.mmdit",
    "ZImageTransformer2DModel": "gadjax.models.zimage",
    "Lumina2Transformer2DModel": "gadjax.models.lumina2",
    "FluxTransformer2DModel": "gadjax.models.flux",
    "Flux2Transformer2DModel": "gadjax.models.flux2",
    "CLIPTextModel": "gadjax.models.text.clip",
    "CLIPTextModelWithProjection": "gadjax.models.text.clip",
    "T5EncoderModel": "gadjax.models.text.t5",
    "Gemma2Model": "gadjax.models.text.gemma2",
    "Qwen3Model": "gadjax.models.text.qwen3",
    "Qwen3ForCausalLM": "gadjax.models.text.qwen3",
    "AutoencoderKL": "gadjax.models.vae.autoencoder_kl",
    "AutoencoderDC": "gadjax.models.vae.autoencoder_dc",
    "AutoencoderKLFlux2": "gadjax.models.vae.autoencoder_flux2",
}

# Word in an option's name -> its largest number and the most items of a list: far above what is
# published, and below what would take minutes or all memory to trace.
LIMITS = {
    "per_block": (32, 16),
    "layers": (256, 256),
    "sample_size": (4096, 0),
    "max_size": (4096, 0),
    "": (1 << 22, 16),
}
MAX_ARRAY_ELEMENTS = 1 << 40


def family_of(class_name: str) -> Family:
    """Family of a class. class_name: a key of COMPONENTS."""
    return importlib.import_module(COMPONENTS[class_name]).FAMILY


def read_network(
    where: Path, class_name: str, config: dict[str, Any]
) -> tuple[Family, Any, Params]:
    """Family of a network's class, its Config and its abstract parameters.

    Args:
      where: the file that `config` was read from.
      class_name: a key of COMPONENTS.
      config: the content of its config.json.

    Returns: (family, its Config, shapes and dtypes of the parameters).
    Raises: InputError naming `where` for a configuration from which no such network can be built.
    """
    family = family_of(class_name)
    if isinstance(family, TextEncoder) and not config.get("architectures"):
        config = config | {"architectures": [class_name]}  # older ones leave it to model_index.json
    try:
        spec = family.config.from_dict(config)
        _check(spec)
        return family, spec, _abstract(family, spec)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception as error:  # values that no check covers fail wherever the network is built
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{where}: found values that make no {class_name} ({reason}); expected its "
            "configuration"
        ) from None


@functools.lru_cache(maxsize=8)
def _abstract(family: Family, spec: Any) -> Params:
    """Abstract parameters of a network.

    Cached, since tracing takes as long as all other checks and a command checks more than once.
    """
    abstract = functional(family.build(spec)).abstract
    for leaf in jax.tree.leaves(abstract):
        if math.prod(leaf.shape) > MAX_ARRAY_ELEMENTS:
            raise InputError(f"found an array of shape {leaf.shape}; expected a smaller network")
    return abstract


def _check(spec: Any) -> None:
    """Check the types and sizes of all options. Raises: InputError naming the first bad one."""
    hints = typing.get_type_hints(type(spec))
    for field in fields(spec):
        value, hint = getattr(spec, field.name), hints[field.name]
        if not _has_type(value, hint):
            kind = str(hint) if typing.get_args(hint) else hint.__name__
            raise InputError(f"{field.name}: found {short_repr(value)}; expected {kind}")
        largest, items = next(limit for word, limit in LIMITS.items() if word in field.name)
        if not _is_within(value, largest, items):
            raise InputError(
                f"{field.name}: found {short_repr(value)}; expected at most {largest}, and at most "
                f"{items} items of a list"
            )


def _has_type(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_has_type(value, kind) for kind in inner)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_has_type(item, inner[0]) for item in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint or value is None and hint is types.NoneType


def _is_within(value: Any, largest: int, items: int) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= items and all(_is_within(item, largest, items) for item in value)
    return not isinstance(value, int) or abs(value) <= largest
