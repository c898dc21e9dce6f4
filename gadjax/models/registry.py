"""From a class and its config.json to a network of gadjax, without any parameters."""

import functools
import importlib
import math
import types
import typing
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from gadjax.errors import InputError, short_repr
from gadjax.models.keymap import KeyMap
from gadjax.models.module import functional
from gadjax.types import Params

# Class in model_index.json and config.json -> the module that has its port. Imported when met.
COMPONENTS = {
    "UNet2DConditionModel": "gadjax.models.unet",
    "PixArtTransformer2DModel": "gadjax.models.pixart",
    "Transformer2DModel": "gadjax.models.pixart",
    "SanaTransformer2DModel": "gadjax.models.sana",
    "SD3Transformer2DModel": "gadjax.models.mmdit",
    "CLIPTextModel": "gadjax.models.text.clip",
    "CLIPTextModelWithProjection": "gadjax.models.text.clip",
    "T5EncoderModel": "gadjax.models.text.t5",
    "Gemma2Model": "gadjax.models.text.gemma2",
    "AutoencoderKL": "gadjax.models.vae.autoencoder_kl",
    "AutoencoderDC": "gadjax.models.vae.autoencoder_dc",
}

# Word in an option's name -> its largest number and the most items of a list: far above what is
# published, and below what would take minutes or all memory to outline.
LIMITS = {
    "per_block": (32, 16),
    "layers": (256, 256),
    "sample_size": (4096, 0),
    "max_size": (4096, 0),
    "": (1 << 22, 16),
}
TEXT = "gadjax.models.text."  # networks of transformers
PARAMETERS = 1 << 40  # of one array


def read_network(
    where: Path, class_name: str, config: dict[str, Any]
) -> tuple[ModuleType, Any, Params]:
    """The module of a class, its Config and the shapes of its parameters.

    where: the file that `config` is from. Raises: InputError naming it for a configuration that
    makes no such network.
    """
    module = importlib.import_module(COMPONENTS[class_name])
    if module.__name__.startswith(TEXT) and not config.get("architectures"):
        config = config | {"architectures": [class_name]}  # older ones leave it to model_index.json
    try:
        spec = module.Config.from_dict(config)
        _check(spec)
        return module, spec, _abstract(module, spec)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception as error:  # what no check foresaw fails wherever the network is built
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{where}: found values that make no {class_name} ({reason}); expected its "
            "configuration"
        ) from None


def keymap_of(module: ModuleType, spec: Any) -> KeyMap:
    """Of some networks it depends on the configuration which layers are alike."""
    return module.KEYMAP if hasattr(module, "KEYMAP") else module.keymap(spec)


@functools.lru_cache(maxsize=8)
def _abstract(module: ModuleType, spec: Any) -> Params:
    """Tracing a network takes as long as all other checks, and a command checks more than once."""
    abstract = functional(module.build(spec)).abstract
    for leaf in jax.tree.leaves(abstract):
        if math.prod(leaf.shape) > PARAMETERS:
            raise InputError(f"found an array of shape {leaf.shape}; expected a smaller network")
    return abstract


def _check(spec: Any) -> None:
    """Each option is of its type and of a size that a network can have."""
    hints = typing.get_type_hints(type(spec))
    for field in fields(spec):
        value, hint = getattr(spec, field.name), hints[field.name]
        if not _fits(value, hint):
            kind = str(hint) if typing.get_args(hint) else hint.__name__
            raise InputError(f"{field.name}: found {short_repr(value)}; expected {kind}")
        largest, items = next(most for word, most in LIMITS.items() if word in field.name)
        if not _moderate(value, largest, items):
            raise InputError(
                f"{field.name}: found {short_repr(value)}; expected at most {largest}, and at most "
                f"{items} items of a list"
            )


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, kind) for kind in inner)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(item, inner[0]) for item in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint or value is None and hint is types.NoneType


def _moderate(value: Any, largest: int, items: int) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= items and all(_moderate(item, largest, items) for item in value)
    return not isinstance(value, int) or abs(value) <= largest
