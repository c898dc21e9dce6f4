"""MMDiT, the transformer of Stable Diffusion 3 and 3.5 (diffusers SD3Transformer2DModel)."""

from gadjax.models.family import Backbone
from gadjax.models.mmdit.config import CLASS_NAMES, Config
from gadjax.models.mmdit.keymap import keymap
from gadjax.models.mmdit.net import build
from gadjax.models.mmdit.original import original
from gadjax.models.mmdit.predict import extras, features, predictor, torch_inputs
from gadjax.models.mmdit.prompts import prompts
from gadjax.models.mmdit.rules import FROZEN, RULES

__all__ = ["FAMILY"]

FAMILY = Backbone(
    class_names=CLASS_NAMES,
    config=Config,
    build=build,
    keymap=keymap,
    rules=RULES,
    frozen=FROZEN,
    extras=extras,
    predictor=predictor,
    features=features,
    prompts=prompts,
    torch_inputs=torch_inputs,
    original=original,
)
