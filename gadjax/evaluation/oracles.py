"""Oracles, feature extractors and layout tasks of a world, by which pictures are evaluated.

All are plain callables; `evaluate` takes any. WORLDS are those that the command line can name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import jax
import numpy as np

from gadjax import assets
from gadjax.features.network import FolderExtractor
from gadjax.features.scorers import Scorer
from gadjax.features.shapes import load_features
from gadjax.worlds import layout, oracle, shapes


class Extractor(Protocol):
    """Feature extractor of pictures."""

    def __call__(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Features [N, D] of pictures in [-1, 1], centred so that a cosine means something."""


@dataclass(frozen=True)
class Oracle:
    """Classifier of pictures and parser of captions, by A attributes of a world.

    attributes: their names, in the order of the words.
    classify: pictures [N, H, W, 3] in [-1, 1] -> words [N, A], "" throughout for a picture that is
      none of the world's. Expensive: every picture is classified once.
    parse: a caption -> the words that it names, by attribute. Raises InputError for a caption that
      cannot be parsed.
    """

    attributes: tuple[str, ...]
    classify: Callable[[np.ndarray], np.ndarray]
    parse: Callable[[str], dict[str, str]]

    def adheres(self, words_NA: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Prompt adherence: the picture is of the world and shows every named word, bool [N]."""
        named = np.array([[self.parse(c).get(a, "") for a in self.attributes] for c in captions])
        return np.all((words_NA == named) | (named == ""), axis=1) & (words_NA[:, 0] != "")

    def left_open(self, captions: Sequence[str]) -> np.ndarray:
        """Attributes that each caption does not name: bool [N, A]."""
        return np.array([[a not in self.parse(c) for a in self.attributes] for c in captions])


@dataclass(frozen=True)
class Layout:
    """Layout task: move a shape to a place.

    attribute: the attribute whose words are the keys of `places`.
    places: word -> (x, y) in pixels.
    distance: (image_HWC in [-1, 1], place [2]) -> distance of the picture from the place, 0 at
      best; differentiable.
    """

    attribute: str
    places: dict[str, tuple[float, float]]
    distance: Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class World:
    """World that pictures are evaluated against; any part may be absent.

    size: side of the pictures that oracle and extractor take, in pixels.
    captions: under-specified captions, which leave attributes to the noise, for noise control.
    features, scores: extractors and scorers of any pictures, by the user's names.
    """

    oracle: Oracle | None = None
    extractor: Extractor | None = None
    size: int | None = None
    captions: tuple[str, ...] = ()
    layout: Layout | None = None
    features: Mapping[str, FolderExtractor] = field(default_factory=dict)
    scores: Mapping[str, Scorer] = field(default_factory=dict)


@lru_cache(maxsize=1)
def _shapes_network() -> Extractor:
    return load_features(assets.resolve("asset:shapes_features"))


def shapes_features(images_NHWC: np.ndarray) -> np.ndarray:
    """Features [N, D] of the bundled network, which is loaded at the first call."""
    return _shapes_network()(images_NHWC)


WORLDS = {
    "none": World(),
    "shapes": World(
        Oracle(tuple(shapes.ATTRIBUTES), oracle.words, shapes.parse),
        shapes_features,
        shapes.SIZE,
        layout.CAPTIONS,
        Layout("position", layout.POSITION_CENTRES, layout.squared_distance),
    ),
}
