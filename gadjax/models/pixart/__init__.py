"""PixArt-alpha, a diffusion transformer (diffusers PixArtTransformer2DModel)."""

from gadjax.models.family import Backbone
from gadjax.models.pixart.keymap import KEYMAP
from gadjax.models.pixart.net import CLASS_NAMES, Config, build
from gadjax.models.pixart.original import original
from gadjax.models.pixart.predict import extras, features, predictor, torch_inputs
from gadjax.models.pixart.prompts import prompts
from gadjax.models.pixart.rules import RULES

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
)
