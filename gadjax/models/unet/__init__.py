"""The U-Net of Stable Diffusion 1.5, 2 and XL (diffusers UNet2DConditionModel)."""

from gadjax.models.unet.config import CLASS_NAMES, Config
from gadjax.models.unet.keymap import KEYMAP
from gadjax.models.unet.net import build
from gadjax.models.unet.predict import TEXT_KV, extras, features, predictor
from gadjax.models.unet.prompts import prompts
from gadjax.models.unet.rules import NO_SEQUENCE_SHARDING, RULES

__all__ = [
    "CLASS_NAMES",
    "KEYMAP",
    "RULES",
    "TEXT_KV",
    "NO_SEQUENCE_SHARDING",
    "Config",
    "build",
    "extras",
    "features",
    "predictor",
    "prompts",
]
