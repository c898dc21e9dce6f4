"""Lumina-Image 2.0 (diffusers Lumina2Transformer2DModel): Z-Image's network with other options."""

from gadjax.models.family import Backbone
from gadjax.models.lumina2.config import CLASS_NAMES, Config
from gadjax.models.lumina2.keymap import KEYMAP
from gadjax.models.lumina2.predict import torch_call
from gadjax.models.lumina2.prompts import prompts
from gadjax.models.zimage.net import build
from gadjax.models.zimage.predict import extras, features, predictor
from gadjax.models.zimage.rules import RULES

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
    torch_call=torch_call,
    guided_norm=-2,
)
