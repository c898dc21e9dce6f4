"""The U-Net of Stable Diffusion 1.5, 2 and XL (diffusers UNet2DConditionModel)."""

from gadjax.models.family import Backbone
from gadjax.models.unet.config import CLASS_NAMES, Config
from gadjax.models.unet.keymap import KEYMAP
from gadjax.models.unet.net import build
from gadjax.models.unet.original import original
from gadjax.models.unet.predict import extras, features, predictor, torch_inputs
from gadjax.models.unet.prompts import prompts
from gadjax.models.unet.rules import NO_SEQUENCE_SHARDING, RULES

__all__ = ["FAMILY"]

FAMILY = Backbone(
    class_names=CLASS_NAMES,
    config=Config,
    build=build,
    keymap=KEYMAP,
    rules=RULES,
    extras=extras,
    predictor=predictor,
    features=features,
    prompts=prompts,
    torch_inputs=torch_inputs,
    original=original,
    text_kv="text_kv",
    no_sequence_sharding=NO_SEQUENCE_SHARDING,
)
