"""Z-Image, a single-stream diffusion transformer (diffusers ZImageTransformer2DModel)."""

from gadjax.models.family import Backbone
from gadjax.models.zimage.config import CLASS_NAMES, Config
from gadjax.models.zimage.keymap import KEYMAP
from gadjax.models.zimage.net import build
from gadjax.models.zimage.original import original
from gadjax.models.zimage.predict import extras, features, predictor, torch_call
from gadjax.models.zimage.prompts import prompts
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
    original=original,
)
