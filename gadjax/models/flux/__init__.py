"""FLUX.1, a transformer of double and single blocks (diffusers FluxTransformer2DModel)."""

from gadjax.models.family import Backbone
from gadjax.models.flux.config import CLASS_NAMES, Config
from gadjax.models.flux.keymap import KEYMAP
from gadjax.models.flux.net import build
from gadjax.models.flux.original import original
from gadjax.models.flux.predict import features, predictor, torch_call
from gadjax.models.flux.prompts import prompts
from gadjax.models.flux.rules import RULES
from gadjax.models.mmdit.predict import extras

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
    original=original,
)
