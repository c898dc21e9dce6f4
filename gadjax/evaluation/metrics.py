"""Which numbers are taken of one row of pictures, and which cannot be."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gadjax.evaluation.diversity import pairwise_distance, seed_alignment, vendi
from gadjax.evaluation.frechet import frechet
from gadjax.evaluation.sensitivity import compare_tangents
from gadjax.evaluation.statistics import Estimate, geometric_mean, mean, ratio, wilson
from gadjax.evaluation.worlds import World


@dataclass(frozen=True)
class Drawn:
    """P prompts at S seeds by one model: pictures, their features, T tangents of every prompt."""

    images_PSHWC: np.ndarray
    features_PSD: np.ndarray | None
    tangents_TPHWC: np.ndarray | None

    @property
    def pixels_PSD(self) -> np.ndarray:
        return self.images_PSHWC.reshape(*self.images_PSHWC.shape[:2], -1)


# Name -> title and meaning, in the order of the report.
METRICS = {
    "adherence": (
        "prompt adherence",
        "share of the pictures that show what their prompt says, by the world's oracle",
    ),
    "frechet": (
        "Fréchet distance",
        "between the features of these pictures and of the teacher's at other seeds of the same "
        "prompts; the teacher's own value is the floor for this many pictures",
    ),
    "vendi": (
        "Vendi score",
        "effective number of different pictures among the seeds of a prompt (cosine of features), "
        "mean over prompts: 1 = all alike, number of seeds = all different",
    ),
    "vendi_ratio": ("Vendi score / teacher's", "1 = as diverse as the teacher"),
    "distance_features": (
        "distance between seeds, features",
        "root mean square difference of two pictures of one prompt, mean over pairs and prompts",
    ),
    "distance_features_ratio": ("distance, features / teacher's", "1 = as diverse as the teacher"),
    "distance_pixels": (
        "distance between seeds, pixels",
        "the same of colour values in [-1, 1]",
    ),
    "distance_pixels_ratio": ("distance, pixels / teacher's", "1 = as diverse as the teacher"),
    "alignment_features": (
        "seed alignment, features",
        "share of the pictures whose nearest among the teacher's pictures of that prompt is the "
        "one from the same noise; chance is 1 / seeds",
    ),
    "alignment_pixels": ("seed alignment, pixels", "the same by colour values"),
    "tangent_cosine": (
        "noise sensitivity, cosine",
        "between J v of this map from noise to x0 and of the teacher's, v a random direction, "
        "mean: 1 = a change of noise does the same thing",
    ),
    "tangent_norm_ratio": (
        "noise sensitivity, norm / teacher's",
        "|J v| over the teacher's, geometric mean: below 1 = noise is heard less",
    ),
}


def row_metrics(
    row: Drawn,
    teacher: Drawn,
    others_PSD: np.ndarray | None,
    prompts: Sequence[str],
    world: World,
) -> dict[str, Estimate]:
    """Every metric that can be taken; those that compare with the teacher not of itself.

    others_PSD: features of the teacher's pictures at other seeds.
    """
    found = {}
    if world.oracle:
        seeds, flat = row.images_PSHWC.shape[1], _flat(row.images_PSHWC)
        hits = world.oracle(flat, [prompt for prompt in prompts for _ in range(seeds)])
        found["adherence"] = wilson(int(np.sum(hits)), len(flat))
    if row.features_PSD is not None:
        if others_PSD is not None and _enough(others_PSD):
            found["frechet"] = Estimate(frechet(_flat(row.features_PSD), _flat(others_PSD)))
        scores = vendi(row.features_PSD)
        found["vendi"] = mean(scores)
        if row is not teacher:
            found["vendi_ratio"] = ratio(scores, vendi(teacher.features_PSD))
        found |= _seed_metrics("features", row.features_PSD, teacher.features_PSD, row is teacher)
    found |= _seed_metrics("pixels", row.pixels_PSD, teacher.pixels_PSD, row is teacher)
    if row.tangents_TPHWC is not None and row is not teacher:
        turns, count = row.tangents_TPHWC.shape[:2]
        cosine, size = compare_tangents(_flat(row.tangents_TPHWC), _flat(teacher.tangents_TPHWC))
        found["tangent_cosine"] = mean(cosine.reshape(turns, count).mean(0))
        logs = np.log(np.maximum(size, np.finfo(np.float64).tiny)).reshape(turns, count)
        found["tangent_norm_ratio"] = geometric_mean(np.exp(logs.mean(0)))
    return {name: found[name] for name in METRICS if name in found}


def absent_metrics(teacher: Drawn, world: World) -> dict[str, str]:
    """Metric -> why it is not there."""
    absent = {}
    if world.oracle is None:
        absent["adherence"] = "no oracle"
    if world.extractor is None:
        for name in METRICS:
            if name in ("frechet", "vendi", "vendi_ratio") or "features" in name:
                absent[name] = "no feature extractor"
    elif not _enough(teacher.features_PSD):
        prompts, seeds, width = teacher.features_PSD.shape
        absent["frechet"] = f"{prompts * seeds} pictures; takes more than the {width} features"
    for kind, x_PSD in (("features", teacher.features_PSD), ("pixels", teacher.pixels_PSD)):
        if x_PSD is not None and not _varies(x_PSD):
            absent[f"distance_{kind}_ratio"] = "the teacher draws every seed alike"
    if teacher.tangents_TPHWC is None:
        absent |= {name: "no tangents asked for" for name in METRICS if "tangent" in name}
    return absent


def _seed_metrics(
    kind: str, x_PSD: np.ndarray, teacher_PSD: np.ndarray, itself: bool
) -> dict[str, Estimate]:
    distance = pairwise_distance(x_PSD)
    found = {f"distance_{kind}": mean(distance)}
    if not itself:
        if _varies(teacher_PSD):
            found[f"distance_{kind}_ratio"] = ratio(distance, pairwise_distance(teacher_PSD))
        found[f"alignment_{kind}"] = mean(seed_alignment(x_PSD, teacher_PSD))
    return found


def _flat(x: np.ndarray) -> np.ndarray:
    """The first two axes as one."""
    return x.reshape(-1, *x.shape[2:])


def _enough(features_PSD: np.ndarray) -> bool:
    prompts, seeds, width = features_PSD.shape
    return prompts * seeds > width


def _varies(x_PSD: np.ndarray) -> bool:
    return bool(np.any(x_PSD != x_PSD[:, :1]))
