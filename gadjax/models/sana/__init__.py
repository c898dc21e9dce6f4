"""Sana, a linear diffusion transformer: v1, 1.5, Sprint (diffusers SanaTransformer2DModel)."""

from gadjax.models.sana.keymap import KEYMAP
from gadjax.models.sana.net import CLASS_NAMES, Config, build
from gadjax.models.sana.predict import TEXT_KV, extras, features, predictor
from gadjax.models.sana.prompts import prompts
from gadjax.models.sana.rules import RULES

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
