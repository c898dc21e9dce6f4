"""Noise-control tasks: retrieval, layout control and interpolation over one library of noises.

C under-specified captions share a library of L noises, from which pictures are drawn once for all
three tasks. A attributes; a word is "" where the picture shows nothing of the world.
"""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from gadjax.evaluation.draw import check_finite, map_pictures
from gadjax.evaluation.interpolation import slerp
from gadjax.evaluation.layout_control import (
    GRADIENT_EVALUATIONS,
    SNAPSHOT_STEPS,
    PixelTargets,
    angles_degrees,
    polyak_descent,
)
from gadjax.evaluation.metrics import merge_leading_axes
from gadjax.evaluation.oracles import World
from gadjax.io.image_grid import to_uint8
from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import initial_noise

LIBRARY_SEED = 1_000_003  # no prompt's pictures start from the library's noises
PATHS, POINTS = 16, 9
MOVE_COST = GRADIENT_EVALUATIONS * (SNAPSHOT_STEPS[-1] + 1)  # pictures drawn for one target


@dataclass(frozen=True)
class Library:
    """Noise library with M paths: path m joins noises 2m and 2m + 1 under caption m mod C."""

    world: World
    noise_LHWC: np.ndarray

    @property
    def captions(self) -> tuple[str, ...]:
        return self.world.captions

    @property
    def paths(self) -> list[tuple[int, int, int]]:
        """Caption, first noise and last noise of every path."""
        count = min(PATHS, len(self.noise_LHWC) // 2)
        return [(m % len(self.captions), 2 * m, 2 * m + 1) for m in range(count)]

    def sets(self) -> dict[str, tuple[list[str], np.ndarray]]:
        """Prompts and noises to draw: every caption from every noise, and the paths' interiors."""
        count, between = len(self.captions), POINTS - 2
        arcs = [
            slerp(self.noise_LHWC[a], self.noise_LHWC[b], POINTS)[1:-1] for _, a, b in self.paths
        ]
        return {
            "library": (
                [c for c in self.captions for _ in self.noise_LHWC],
                np.concatenate([self.noise_LHWC] * count),
            ),
            "paths": (
                [self.captions[c] for c, _, _ in self.paths for _ in range(between)],
                np.concatenate(arcs),
            ),
        }


def make_library(world: World, count: int, latent: tuple[int, int, int]) -> Library:
    """Library of `count` noises of shape `latent` (H, W, C), the same ones at every call."""
    return Library(world, initial_noise(LIBRARY_SEED, count, latent))


@dataclass(frozen=True)
class LayoutTargets:
    """N layout targets: move the shape drawn from noise n under captions[n] to places[n].

    No two share a noise, so that they are independent.
    """

    captions: np.ndarray
    places: tuple[str, ...]


def choose_targets(library: Library, teacher_CLA: np.ndarray, count: int) -> LayoutTargets:
    """Random layout targets, at places other than those in the teacher's pictures.

    Noise n gets the first caption, from n mod C on, to which the teacher's picture adheres.

    Args:
      library: captions and noises.
      teacher_CLA: words of the teacher's pictures of the library.
      count: number of targets, at most one for each noise.
    """
    rng = np.random.default_rng(0)
    world, (total, noises) = library.world, teacher_CLA.shape[:2]
    prompts = [caption for caption in library.captions for _ in range(noises)]
    fits_CL = world.oracle.adheres(merge_leading_axes(teacher_CLA), prompts).reshape(total, noises)
    column = world.oracle.attributes.index(world.layout.attribute)
    captions, places = [], []
    for n in range(min(count, noises)):
        order = (n + np.arange(total)) % total
        caption = int(order[np.argmax(fits_CL[order, n])])
        others = [word for word in world.layout.places if word != teacher_CLA[caption, n, column]]
        captions.append(caption)
        places.append(others[rng.integers(len(others))])
    return LayoutTargets(np.array(captions), tuple(places))


@dataclass(frozen=True)
class LayoutResult:
    """Pictures (uint8) after each of R = len(SNAPSHOT_STEPS) numbers of steps, whether each reached
    its target, and the angle in degrees between the noises before and after."""

    images_RNHWC: np.ndarray
    reached_RN: np.ndarray
    angles_N: np.ndarray


@dataclass(frozen=True)
class NoiseControl:
    """Noise-control pictures of one model, uint8: the library, the paths, and the moved shapes."""

    images_CLHWC: np.ndarray
    words_CLA: np.ndarray
    paths_MKHWC: np.ndarray
    path_words_MKA: np.ndarray
    layout_result: LayoutResult | None = None


@dataclass(frozen=True)
class ControlResults:
    """Noise-control tasks, and each model's pictures by the key of its row."""

    library: Library
    targets: LayoutTargets | None
    rows: dict[str, NoiseControl]


def classify_library(library: Library, images: dict[str, np.ndarray]) -> NoiseControl:
    """Pictures of `Library.sets` with the words that the oracle assigns to them."""
    classify = library.world.oracle.classify
    shape = len(library.captions), len(library.noise_LHWC)
    images_CL = images["library"].reshape(*shape, *images["library"].shape[1:])
    words_CL = map_pictures(classify, images_CL)
    paths = _with_endpoints(library, images_CL, images["paths"])
    words = _with_endpoints(library, words_CL, map_pictures(classify, images["paths"]))
    return NoiseControl(images_CL, words_CL, paths, words)


def _with_endpoints(library: Library, drawn_CL: np.ndarray, between: np.ndarray) -> np.ndarray:
    """Paths [M, K, ...] from their interiors and the library's pictures at their ends."""
    interiors = between.reshape(len(library.paths), POINTS - 2, *drawn_CL.shape[2:])
    return np.stack(
        [
            np.concatenate([drawn_CL[c, a, None], interior, drawn_CL[c, b, None]])
            for (c, a, b), interior in zip(library.paths, interiors, strict=True)
        ]
    )


def optimize_noise(
    model: Model,
    library: Library,
    targets: LayoutTargets,
    start: NoiseControl,
    batch: int,
    bar: tqdm,
) -> LayoutResult:
    """Optimize one noise for each layout target by the gradient through the model's sampler.

    Args:
      model: teacher or student.
      library: captions and noises.
      targets: captions and places, one for each of the first N noises.
      start: the model's pictures of the library, which are those before the first step.
      batch: pictures at a time in plain sampling; gradients take a GRADIENT_EVALUATIONS-th of it.
      bar: progress in network evaluations.
    Raises: InputError for pictures that are not finite.
    """
    world = library.world
    prompts = [library.captions[c] for c in targets.captions]
    places = np.array([world.layout.places[word] for word in targets.places], np.float32)
    noise = library.noise_LHWC[: len(prompts)]
    noises, images = polyak_descent(
        model,
        prompts,
        noise,
        PixelTargets(places, world.layout.distance),
        batch=max(1, batch // GRADIENT_EVALUATIONS),
        progress=lambda done: bar.update(done * MOVE_COST * model.evaluations),
    )
    check_finite(model, images)
    images_RN = to_uint8(images.swapaxes(0, 1))
    # Before the first step, the pictures are those of the library.
    words = map_pictures(world.oracle.classify, images_RN[1:])
    first = start.words_CLA[targets.captions, np.arange(len(prompts))]
    words_RNA = np.concatenate([first[None], words])
    column = world.oracle.attributes.index(world.layout.attribute)
    reached = [
        world.oracle.adheres(words_NA, prompts) & (words_NA[:, column] == np.array(targets.places))
        for words_NA in words_RNA
    ]
    return LayoutResult(images_RN, np.stack(reached), angles_degrees(noise, noises[:, -1]))
