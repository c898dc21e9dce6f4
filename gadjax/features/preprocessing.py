"""Preprocessing of pictures for feature networks, on the host: resize, crop, scale, normalise.

Published numbers come from Pillow's uint8 resizing, which a resizing inside a program matches only
to some levels of 255; without antialias it is 20 levels off. So recipes are those of transformers'
image processors (their Pillow versions, bit for bit), read from preprocessor_config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gadjax.errors import InputError, check_choice, short_repr
from gadjax.io.untrusted import is_count, is_number, read_json

FILE = "preprocessor_config.json"
MAX_SIDE = 4096  # pixels; published ones have at most 518
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_SHORTEST = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True}
_SQUASH = {"size": {"height": 224, "width": 224}, "do_center_crop": False}
# image_processor_type without Fast or Pil -> defaults of the class in transformers.
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _SHORTEST | {"resample": 3, "statistics": CLIP},
    "BitImageProcessor": _SHORTEST | {"resample": 3, "statistics": CLIP},
    "SiglipImageProcessor": _SQUASH | {"resample": 3, "statistics": HALF},
    "DINOv3ViTImageProcessor": _SQUASH | {"resample": 2, "statistics": IMAGENET},
}
OLDER = {"CLIPFeatureExtractor": "CLIPImageProcessor"}
FLOAT_FIRST = ("DINOv3ViTImageProcessor",)  # scaled to 0 .. 1 before it is resized


@dataclass(frozen=True)
class Recipe:
    """Preprocessing of one picture.

    Attributes:
      name: for reports: the processor's class, or the name of a recipe here.
      edge: shorter side after resizing, in pixels, by which the aspect ratio is kept; 0 for none.
      size: (height, width) after resizing, whatever the aspect ratio; None for none.
      resample: Pillow's number of the filter.
      crop: (height, width) of the centre that is kept; None for all.
      scale: factor of the uint8 values.
      mean, std: of the normalisation, by channel.
      float_first: scale before resizing, in float, as DINOv3's processor does.
    """

    name: str
    edge: int = 0
    size: tuple[int, int] | None = None
    resample: int = 3
    crop: tuple[int, int] | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    float_first: bool = False

    def __str__(self) -> str:
        filter_name = Image.Resampling(self.resample).name.lower()
        parts = []
        if self.edge:
            parts.append(f"shorter side to {self.edge}, {filter_name}")
        if self.size:
            parts.append(f"to {self.size[0]} x {self.size[1]}, {filter_name}")
        if self.crop:
            parts.append(f"centre {self.crop[0]} x {self.crop[1]}")
        numbers = (" ".join(f"{x:g}" for x in values) for values in (self.mean, self.std))
        return "; ".join([self.name, *parts, "mean {}, std {}".format(*numbers)])

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Size of a picture after resizing, before the crop."""
        if self.edge:
            short, long = min(height, width), max(height, width)
            long = int(self.edge * long / short)
            return (long, self.edge) if width <= height else (self.edge, long)
        return self.size or (height, width)

    def __call__(self, image_HWC: np.ndarray) -> np.ndarray:
        """Prepare a picture uint8 [H, W, 3]: float32 [h, w, 3]."""
        size = self.target(*image_HWC.shape[:2])
        if self.float_first:
            x = image_HWC.astype(np.float32) * np.float32(self.scale)
            x = _resize_floats(x, size, self.resample)
            x = self._crop(x)
        else:
            if self.edge or self.size:
                image = Image.fromarray(image_HWC)
                image_HWC = np.asarray(image.resize(size[::-1], Image.Resampling(self.resample)))
            x = (self._crop(image_HWC).astype(np.float64) * self.scale).astype(np.float32)
        return (x - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def _crop(self, x: np.ndarray) -> np.ndarray:
        if self.crop is None:
            return x
        top, left = ((have - want) // 2 for have, want in zip(x.shape[:2], self.crop, strict=True))
        return x[top : top + self.crop[0], left : left + self.crop[1]]


def _resize_floats(x_HWC: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """Resize in float32, channel by channel, with Pillow's antialiased filters."""
    channels = [
        Image.fromarray(np.ascontiguousarray(x_HWC[..., c]), mode="F").resize(
            size[::-1], Image.Resampling(resample)
        )
        for c in range(x_HWC.shape[-1])
    ]
    return np.stack([np.asarray(channel) for channel in channels], -1)


# By name, in place of the folder's: dgm-eval's (Stein et al. 2023, FD-DINOv2 and its CLIP).
RECIPES = {"dgm": Recipe("dgm", size=(224, 224), mean=IMAGENET[0], std=IMAGENET[1])}


def read_recipe(folder: Path, name: str | None = None) -> Recipe:
    """Recipe of a folder's preprocessor_config.json, or a named one in its place.

    Raises: InputError for a missing or unsupported file, and for an unknown name.
    """
    if name is not None:
        check_choice("recipe", name, RECIPES)
        return RECIPES[name]
    path = folder / FILE
    cfg = read_json(path)
    try:
        return recipe_from_dict(cfg)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def recipe_from_dict(cfg: Mapping[str, Any]) -> Recipe:
    """Recipe of the content of a preprocessor_config.json. Raises: InputError naming the key."""
    kind = cfg.get("image_processor_type", cfg.get("feature_extractor_type"))
    kind = kind.removesuffix("Fast").removesuffix("Pil") if isinstance(kind, str) else kind
    kind = OLDER.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in PROCESSORS:
        _refuse("image_processor_type", kind, f"one of {', '.join(PROCESSORS)}")
    defaults = {"do_resize": True, "do_rescale": True, "do_normalize": True} | PROCESSORS[kind]
    values = {**defaults, **{key: value for key, value in cfg.items() if value is not None}}
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if type(values[key]) is not bool:
            _refuse(key, values[key], "true or false")
    if values.get("do_pad"):
        _refuse("do_pad", values["do_pad"], "false")
    edge, size = (0, None) if not values["do_resize"] else _size("size", values["size"])
    crop = None
    if values["do_center_crop"]:
        side, crop = _size("crop_size", values.get("crop_size"), square=True)
        crop = crop or (side, side)
        least = (edge, edge) if edge else size
        if least and (crop[0] > least[0] or crop[1] > least[1]):
            _refuse("crop_size", values["crop_size"], "at most the size that pictures have then")
    if values["resample"] not in (0, 1, 2, 3, 4, 5) or type(values["resample"]) is not int:
        _refuse("resample", values["resample"], "a filter of Pillow, 0 to 5")
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if values["do_normalize"]:
        mean, std = (
            _channels(f"image_{part}", values.get(f"image_{part}", default))
            for part, default in zip(("mean", "std"), values["statistics"], strict=True)
        )
        if min(std) <= 0:
            _refuse("image_std", list(std), "positive numbers")
    factor = values.get("rescale_factor", 1 / 255) if values["do_rescale"] else 1.0
    if not is_number(factor) or factor <= 0:
        _refuse("rescale_factor", factor, "a positive number")
    first = kind in FLOAT_FIRST
    return Recipe(
        kind, edge, size, values["resample"], crop, float(factor), mean, std, float_first=first
    )


def _size(key: str, value: Any, square: bool = False) -> tuple[int, tuple[int, int] | None]:
    """(shorter side, None) or (0, (height, width)) of a size."""
    if is_count(value, 1, MAX_SIDE):  # older files; of CLIP and SigLIP the shorter side
        return value, None
    if isinstance(value, dict):
        sides = {key: side for key, side in value.items() if side is not None}
        if all(is_count(side, 1, MAX_SIDE) for side in sides.values()):
            if sides.keys() == {"shortest_edge"} and not square:
                return sides["shortest_edge"], None
            if sides.keys() == {"height", "width"}:
                return 0, (sides["height"], sides["width"])
    _refuse(key, value, f"shortest_edge, or height and width, of at most {MAX_SIDE} pixels")


def _channels(key: str, value: Any) -> tuple[float, ...]:
    if not (isinstance(value, list | tuple) and len(value) == 3 and all(map(is_number, value))):
        _refuse(key, value, "3 numbers")
    return tuple(float(x) for x in value)


def _refuse(key: str, value: Any, expected: str):
    raise InputError(f"{key}: found {short_repr(value)}; expected {expected}")
