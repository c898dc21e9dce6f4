"""MMDiT, the transformer of Stable Diffusion 3 and 3.5 (diffusers SD3Transformer2DModel)."""

from gadjax.models.mmdit.keymap import keymap
from gadjax.models.mmdit.net import CLASS_NAMES, Config, build
from gadjax.models.mmdit.predict import extras, features, predictor
from gadjax.models.mmdit.prompts import prompts
from gadjax.models.mmdit.rules import FROZEN, RULES

__all__ = [
    "CLASS_NAMES",
    "FROZEN",
    "RULES",
    "Config",
    "build",
    "extras",
    "features",
    "keymap",
    "predictor",
    "prompts",
]
