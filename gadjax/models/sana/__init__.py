"""Sana, a linear diffusion transformer: v1, 1.5, Sprint (diffusers SanaTransformer2DModel)."""

from gadjax.models.family import Backbone
from gadjax.models.sana.keymap import KEYMAP
from gadjax.models.sana.net import CLASS_NAMES, Config, build
from gadjax.models.sana.predict import extras, features, predictor, torch_inputs
from gadjax.models.sana.prompts import prompts
from gadjax.models.sana.rules import RULES

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
    text_kv="text_kv",
)
