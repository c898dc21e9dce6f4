"""PixArt-alpha, a diffusion transformer (diffusers PixArtTransformer2DModel)."""

from gadjax.models.pixart.keymap import KEYMAP
from gadjax.models.pixart.net import CLASS_NAMES, Config, build
from gadjax.models.pixart.predict import TEXT_KV, extras, features, predictor
from gadjax.models.pixart.prompts import prompts
from gadjax.models.pixart.rules import RULES

__all__ = [
    "CLASS_NAMES",
    "KEYMAP",
    "RULES",
    "TEXT_KV",
    "Config",
    "build",
    "extras",
    "features",
    "predictor",
    "prompts",
]
