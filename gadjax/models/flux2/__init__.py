"""FLUX.2-klein, double and single blocks of one modulation (diffusers Flux2Transformer2DModel)."""

from gadjax.models.family import Backbone
from gadjax.models.flux2.config import CLASS_NAMES, Config
from gadjax.models.flux2.keymap import KEYMAP
from gadjax.models.flux2.net import build
from gadjax.models.flux2.original import original
from gadjax.models.flux2.predict import features, predictor, torch_call
from gadjax.models.flux2.prompts import prompts
from gadjax.models.flux2.rules import RULES
from gadjax.models.zimage.predict import extras

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
