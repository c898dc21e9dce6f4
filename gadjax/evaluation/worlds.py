"""What can say whether a picture shows its prompt, and how pictures differ in what they show.

Both are plain callables; `evaluate` takes any. WORLDS are those that the command line can name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from gadjax import assets
from gadjax.evaluation.features import load_features
from gadjax.worlds import oracle, shapes


class Oracle(Protocol):
    def __call__(self, images_NHWC: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Whether each picture, in [-1, 1], shows what its caption says: bool [N]."""


class Extractor(Protocol):
    def __call__(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Features [N, D] of pictures in [-1, 1], centred so that a cosine means something."""


@dataclass(frozen=True)
class World:
    """An oracle and an extractor, either of them absent.

    read: raises InputError for a caption that the oracle does not understand.
    size: side of the pictures that oracle and extractor take, None for any.
    """

    oracle: Oracle | None = None
    extractor: Extractor | None = None
    read: Callable[[str], object] | None = None
    size: int | None = None


@lru_cache(maxsize=1)
def _shapes_network() -> Extractor:
    return load_features(assets.resolve("asset:shapes_features"))


def shapes_features(images_NHWC: np.ndarray) -> np.ndarray:
    """By the bundled network, which is read when first needed."""
    return _shapes_network()(images_NHWC)


WORLDS = {
    "none": World(),
    "shapes": World(oracle.adherence, shapes_features, shapes.parse, shapes.SIZE),
}
