"""What every model is asked to do with the same noises, and what it did with them.

C under-specified captions share a library of L noises, from which pictures are drawn once and
serve three tasks: retrieval, moving a shape by its noise, and walking from noise to noise. A words;
"" where a picture shows nothing.
"""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from gadjax.evaluation.draw import check_finite
from gadjax.evaluation.interpolation import slerp
from gadjax.evaluation.layout_control import (
    GRADIENT_EVALUATIONS,
    SNAPSHOT_STEPS,
    angles_degrees,
    polyak_descent,
)
from gadjax.evaluation.metrics import merge_leading_axes
from gadjax.evaluation.oracles import World
from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import initial_noise

SEED = 1_000_003  # of the library: no prompt's pictures start from its noises
PATHS, POINTS = 16, 9
MOVE_COST = GRADIENT_EVALUATIONS * (SNAPSHOT_STEPS[-1] + 1)  # of each, in pictures drawn


@dataclass(frozen=True)
class Library:
    """The noises, and M paths: m leads from noise 2m to noise 2m + 1, under caption m mod C."""

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
        """What to draw: every caption from every noise, and between the ends of the paths."""
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
    return Library(world, initial_noise(SEED, count, latent))


@dataclass(frozen=True)
class LayoutTargets:
    """N wishes: what noise n of the library draws under caption captions[n] shall be at places[n].

    No two share a noise, so that they are independent.
    """

    captions: np.ndarray
    places: tuple[str, ...]


def choose_targets(library: Library, teacher_CLA: np.ndarray, count: int) -> LayoutTargets:
    """To places other than where the teacher's picture is, at random.

    Noise n gets the first caption from n mod C on of which the teacher draws what it names.
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
    """Pictures after each of STEPS steps, whether they show what was wished for, and how far the
    noises went in all, in degrees."""

    images_RNHWC: np.ndarray
    reached_RN: np.ndarray
    angles_N: np.ndarray


@dataclass(frozen=True)
class NoiseControl:
    """What one model drew: the library, the paths, and what was moved."""

    images_CLHWC: np.ndarray
    words_CLA: np.ndarray
    paths_MKHWC: np.ndarray
    path_words_MKA: np.ndarray
    moved: LayoutResult | None = None


@dataclass(frozen=True)
class ControlResults:
    """The tasks, and what each model made of them, by its row's key."""

    library: Library
    moves: LayoutTargets | None
    rows: dict[str, NoiseControl]


def classify_library(library: Library, images: dict[str, np.ndarray]) -> NoiseControl:
    """What the pictures of `Library.sets` show."""
    classify = library.world.oracle.classify
    shape = len(library.captions), len(library.noise_LHWC)
    images_CL = images["library"].reshape(*shape, *images["library"].shape[1:])
    words_CL = classify(images["library"]).reshape(*shape, -1)
    paths = _whole(library, images_CL, images["paths"])
    words = _whole(library, words_CL, classify(images["paths"]))
    return NoiseControl(images_CL, words_CL, paths, words)


def _whole(library: Library, drawn_CL: np.ndarray, between: np.ndarray) -> np.ndarray:
    """The paths [M, K, ...] with their ends, which the library holds."""
    ways = between.reshape(len(library.paths), POINTS - 2, *drawn_CL.shape[2:])
    return np.stack(
        [
            np.concatenate([drawn_CL[c, a, None], way, drawn_CL[c, b, None]])
            for (c, a, b), way in zip(library.paths, ways, strict=True)
        ]
    )


def optimize_noise(
    model: Model,
    library: Library,
    moves: LayoutTargets,
    start: NoiseControl,
    batch: int,
    bar: tqdm,
) -> LayoutResult:
    """Follow the model's own gradient to each place."""
    world = library.world
    prompts = [library.captions[c] for c in moves.captions]
    places = np.array([world.layout.places[word] for word in moves.places], np.float32)
    noise = library.noise_LHWC[: len(prompts)]
    ways, images = polyak_descent(
        model,
        prompts,
        noise,
        places,
        world.layout.distance,
        batch=max(1, batch // GRADIENT_EVALUATIONS),
        progress=lambda done: bar.update(done * MOVE_COST * model.evaluations),
    )
    check_finite(model, images)
    images_RN = images.swapaxes(0, 1)
    # Before the first step, the pictures are those of the library.
    words = world.oracle.classify(merge_leading_axes(images_RN[1:])).reshape(
        len(SNAPSHOT_STEPS) - 1, len(prompts), -1
    )
    first = start.words_CLA[moves.captions, np.arange(len(prompts))]
    words_RNA = np.concatenate([first[None], words])
    column = world.oracle.attributes.index(world.layout.attribute)
    reached = [
        world.oracle.adheres(seen_NA, prompts) & (seen_NA[:, column] == np.array(moves.places))
        for seen_NA in words_RNA
    ]
    return LayoutResult(images_RN, np.stack(reached), angles_degrees(noise, ways[:, -1]))
