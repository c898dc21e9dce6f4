"""Features and scores of one model's pictures by named extractors and scorers, batch by batch.

P prompts, S seeds, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gadjax.evaluation.draw import overlaps, set_ranges
from gadjax.evaluation.noises import Sets
from gadjax.evaluation.oracles import World
from gadjax.evaluation.seed_probe import low_pass
from gadjax.features.network import FolderExtractor
from gadjax.io.image_grid import to_uint8

PIXELS = "pixels_16"  # features of the seed probe beside the extractors': see `low_pass`


@dataclass(frozen=True)
class LearnedOutputs:
    """Features and scores of one model's pictures.

    features, scores: of the evaluated seeds, [P, S, D] and [P, S] by name.
    others: features of the teacher's pictures at other seeds, the reference of set distances.
    low_pass_PSD: mean colours of blocks; None unless all prompts start from the same noises.
    """

    features: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    others: dict[str, np.ndarray]
    low_pass_PSD: np.ndarray | None = None


class Observer:
    """Collector of features and scores, batch by batch; a picture is dropped after its batch.

    Args:
      world: its named extractors and scorers.
      sets: prompts and noises of the sets that are drawn, in order; of "own" and "others" features
        are taken, of "own" scores too.
      seeds: S of these sets, which hold seed after seed.
      shared_noise: whether all prompts start from the same noises.
    """

    def __init__(
        self,
        world: World,
        sets: Sets,
        seeds: int,
        shared_noise: bool = False,
    ):
        self.extractors, self.scorers, self.seeds = world.features, world.scores, seeds
        self.shared_noise = shared_noise
        measured = [name for name in ("own", "others") if name in sets]
        ranges = set_ranges(sets)
        self.ranges = {name: ranges[name] for name in measured}
        self.prompts = {name: sets[name][0] for name in measured}
        self.parts: dict[tuple[str, str], list[np.ndarray]] = {}

    def __call__(self, start: int, images_NHWC: np.ndarray) -> None:
        """Take a batch of pictures in [-1, 1], numbered from `start` over all sets."""
        for name, here, there in overlaps(self.ranges, start, len(images_NHWC)):
            self._take(name, images_NHWC[here], self.prompts[name][there])

    def _take(self, name: str, images_NHWC: np.ndarray, prompts: Sequence[str]) -> None:
        images, computed = to_uint8(images_NHWC), {}

        def features(extractor: FolderExtractor) -> np.ndarray:
            # A scorer's folder may be an extractor's too.
            if extractor.fingerprint not in computed:
                computed[extractor.fingerprint] = extractor(images)
            return computed[extractor.fingerprint]

        for key, extractor in self.extractors.items():
            self._append(name, key, features(extractor))
        if name != "own":
            return
        for key, scorer in self.scorers.items():
            self._append("scores", key, scorer(features(scorer.extractor), prompts))
        if self.shared_noise:
            self._append(PIXELS, PIXELS, low_pass(images))

    def _append(self, name: str, key: str, values: np.ndarray) -> None:
        self.parts.setdefault((name, key), []).append(values)

    def outputs(self) -> LearnedOutputs:
        """Features and scores of all batches, by prompt and seed."""
        arrays: dict[str, dict[str, np.ndarray]] = {}
        for (name, key), parts in self.parts.items():
            values = np.concatenate(parts)
            by_seed = values.reshape(self.seeds, -1, *values.shape[1:])
            arrays.setdefault(name, {})[key] = by_seed.swapaxes(0, 1)
        return LearnedOutputs(
            arrays.get("own", {}),
            arrays.get("scores", {}),
            arrays.get("others", {}),
            arrays.get(PIXELS, {}).get(PIXELS),
        )
