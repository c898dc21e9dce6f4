"""What can say what a picture shows, how pictures differ, and what to ask of the noise.

All plain callables; `evaluate` takes any. WORLDS are those that the command line can name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import jax
import numpy as np

from gadjax import assets
from gadjax.evaluation.features import load_features
from gadjax.worlds import layout, oracle, shapes


class Extractor(Protocol):
    def __call__(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Features [N, D] of pictures in [-1, 1], centred so that a cosine means something."""


@dataclass(frozen=True)
class Oracle:
    """Says in words what pictures show, one word for each of A attributes.

    see: pictures [N, H, W, 3] in [-1, 1] -> words [N, A], "" throughout for a picture that is none
      of the world's. Not free; every picture is shown to it once.
    read: a caption -> the words that it names, by attribute. Raises InputError for a caption that
      it does not understand.
    """

    attributes: tuple[str, ...]
    classify: Callable[[np.ndarray], np.ndarray]
    parse: Callable[[str], dict[str, str]]

    def adheres(self, words_NA: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Whether each picture is one of the world's and shows what its caption names: bool [N]."""
        named = np.array([[self.parse(c).get(a, "") for a in self.attributes] for c in captions])
        return np.all((words_NA == named) | (named == ""), axis=1) & (words_NA[:, 0] != "")

    def left_open(self, captions: Sequence[str]) -> np.ndarray:
        """Which attributes each caption does not name: bool [N, A]."""
        return np.array([[a not in self.parse(c) for a in self.attributes] for c in captions])


@dataclass(frozen=True)
class Layout:
    """How to ask for a place. attribute: the one whose words are `places`, (x, y) in pixels.

    distance: (image_HWC in [-1, 1], place [2]) -> how far off the picture is, 0 at best;
      differentiable.
    """

    attribute: str
    places: dict[str, tuple[float, float]]
    distance: Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class World:
    """Any part may be absent. size: side of the pictures that oracle and extractor take.

    captions: which leave attributes to the noise, for the tasks of noise control.
    """

    oracle: Oracle | None = None
    extractor: Extractor | None = None
    size: int | None = None
    captions: tuple[str, ...] = ()
    layout: Layout | None = None


@lru_cache(maxsize=1)
def _shapes_network() -> Extractor:
    return load_features(assets.resolve("asset:shapes_features"))


def shapes_features(images_NHWC: np.ndarray) -> np.ndarray:
    """By the bundled network, which is read when first needed."""
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
