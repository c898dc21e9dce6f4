"""Metrics of one row of pictures, and the reasons for those that are absent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gadjax.evaluation.frechet import frechet, frechet_limit
from gadjax.evaluation.learned import LearnedOutputs
from gadjax.evaluation.oracles import World
from gadjax.evaluation.sensitivity import compare_tangents
from gadjax.evaluation.statistics import (
    Estimate,
    clustered_wilson,
    geometric_mean,
    mean,
    ratio,
)
from gadjax.features.diversity import (
    coverage,
    pairwise_distance,
    relative_difference,
    seed_alignment,
    vendi,
    vendi_corrected,
)

FROM_FEATURES = (
    "frechet",
    "frechet_limit",
    "vendi",
    "vendi_corrected",
    "vendi_ratio",
    "distance_features",
    "distance_features_ratio",
    "alignment_features",
    "identity_features",
)


@dataclass(frozen=True)
class ModelOutputs:
    """Pictures (uint8) of one model for P prompts at S seeds, their features, and T tangents a
    prompt.

    words_PSA: words that the world's oracle assigns to the pictures.
    near_QSHWC, near_features_QSD: pictures and features of the first Q prompts from perturbed
      noise.
    strips_KMNHWC: pictures of K prompts along the M ways of `gadjax.evaluation.strips`.
    learned: features and scores by the world's named extractors and scorers.
    """

    images_PSHWC: np.ndarray
    features_PSD: np.ndarray | None
    tangents_TPHWC: np.ndarray | None
    words_PSA: np.ndarray | None
    near_QSHWC: np.ndarray
    near_features_QSD: np.ndarray | None
    strips_KMNHWC: np.ndarray | None = None
    learned: LearnedOutputs | None = None


def row_metrics(
    row: ModelOutputs,
    teacher: ModelOutputs,
    others_PSD: np.ndarray | None,
    prompts: Sequence[str],
    world: World,
) -> dict[str, Estimate]:
    """Every metric of a row that can be taken; the teacher is not compared with itself.

    Args:
      row: the row's pictures.
      teacher: the teacher's pictures.
      others_PSD: features of the teacher's pictures at other seeds.
      prompts: P prompts.
      world: oracle and feature extractor.
    """
    metrics = {}
    if world.oracle:
        captions = [prompt for prompt in prompts for _ in range(row.words_PSA.shape[1])]
        hits = world.oracle.adheres(merge_leading_axes(row.words_PSA), captions)
        metrics["adherence"] = clustered_wilson(hits.reshape(row.words_PSA.shape[:2]))
        open_PA = world.oracle.left_open(prompts)
        if open_PA.any():
            counts = coverage(row.words_PSA, open_PA)
            metrics["coverage"] = mean(counts)
            teacher_counts = coverage(teacher.words_PSA, open_PA)
            if row is not teacher and teacher_counts.any():
                metrics["coverage_ratio"] = ratio(counts, teacher_counts)
    if row.features_PSD is not None:
        if others_PSD is not None and _enough(others_PSD):
            metrics["frechet"] = Estimate(
                frechet(merge_leading_axes(row.features_PSD), merge_leading_axes(others_PSD))
            )
        if others_PSD is not None and _enough(_half(others_PSD)):
            metrics["frechet_limit"] = Estimate(frechet_limit(row.features_PSD, others_PSD))
        scores = vendi(row.features_PSD)
        metrics["vendi"] = mean(scores)
        metrics["vendi_corrected"] = mean(vendi_corrected(row.features_PSD))
        if row is not teacher:
            metrics["vendi_ratio"] = ratio(scores, vendi(teacher.features_PSD))
        sets = row.features_PSD, teacher.features_PSD, row.near_features_QSD
        metrics |= _seed_metrics("features", *sets, row is teacher)
    sets = (_pixels(x) for x in (row.images_PSHWC, teacher.images_PSHWC, row.near_QSHWC))
    metrics |= _seed_metrics("pixels", *sets, row is teacher)
    if row.tangents_TPHWC is not None and row is not teacher:
        directions, count = row.tangents_TPHWC.shape[:2]
        cosine, size = compare_tangents(
            merge_leading_axes(row.tangents_TPHWC), merge_leading_axes(teacher.tangents_TPHWC)
        )
        metrics["tangent_cosine"] = mean(cosine.reshape(directions, count).mean(0))
        logs = np.log(np.maximum(size, np.finfo(np.float64).tiny)).reshape(directions, count)
        metrics["tangent_norm_ratio"] = geometric_mean(np.exp(logs.mean(0)))
    return metrics


def differences(row: ModelOutputs, teacher: ModelOutputs) -> np.ndarray:
    """Difference of a row from the teacher at the same noises, for each prompt [P]: by features,
    by colour values where there are none (`relative_difference`)."""
    if row.features_PSD is None:
        return relative_difference(_pixels(row.images_PSHWC), _pixels(teacher.images_PSHWC))
    return relative_difference(row.features_PSD, teacher.features_PSD)


def absent_metrics(teacher: ModelOutputs, prompts: Sequence[str], world: World) -> dict[str, str]:
    """Reason for every metric that cannot be taken, by name."""
    absent = {}
    if world.oracle is None:
        absent |= dict.fromkeys(("adherence", "coverage", "coverage_ratio"), "no oracle")
    elif not (open_PA := world.oracle.left_open(prompts)).any():
        why = "no prompt leaves an attribute open"
        absent |= dict.fromkeys(("coverage", "coverage_ratio"), why)
    elif not coverage(teacher.words_PSA, open_PA).any():
        absent["coverage_ratio"] = "the teacher draws no picture of the world"
    if world.extractor is None:
        absent |= dict.fromkeys(FROM_FEATURES, "no feature extractor")
    else:
        absent |= absent_distances(teacher.features_PSD)
    pixels_PSD = _pixels(teacher.images_PSHWC)
    for kind, x_PSD in (("features", teacher.features_PSD), ("pixels", pixels_PSD)):
        if x_PSD is not None and not _varies(x_PSD):
            absent[f"distance_{kind}_ratio"] = "the teacher draws every seed alike"
    if teacher.tangents_TPHWC is None:
        names = ("tangent_cosine", "tangent_norm_ratio")
        absent |= dict.fromkeys(names, "no tangents asked for")
    return absent


def absent_distances(features_PSD: np.ndarray) -> dict[str, str]:
    """Reasons why so many pictures have no Fréchet distance, or no extrapolated one."""
    absent = {}
    for key, x_PSD, what in (
        ("frechet", features_PSD, ""),
        ("frechet_limit", _half(features_PSD), " of half the seeds"),
    ):
        if not _enough(x_PSD):
            count, width = x_PSD[..., 0].size, x_PSD.shape[-1]
            absent[key] = f"{count} pictures{what}; takes more than the {width} features"
    return absent


def _seed_metrics(
    kind: str, x_PSD: np.ndarray, teacher_PSD: np.ndarray, near_QSD: np.ndarray, is_teacher: bool
) -> dict[str, Estimate]:
    distance = pairwise_distance(x_PSD)
    metrics = {f"distance_{kind}": mean(distance)}
    if not is_teacher:
        if _varies(teacher_PSD):
            metrics[f"distance_{kind}_ratio"] = ratio(distance, pairwise_distance(teacher_PSD))
        metrics[f"alignment_{kind}"] = mean(seed_alignment(x_PSD, teacher_PSD))
    # The model's unperturbed pictures in the teacher's place.
    metrics[f"identity_{kind}"] = mean(seed_alignment(x_PSD[: len(near_QSD)], near_QSD))
    return metrics


def _pixels(images_PSHWC: np.ndarray) -> np.ndarray:
    return images_PSHWC.reshape(*images_PSHWC.shape[:2], -1)


def merge_leading_axes(x: np.ndarray) -> np.ndarray:
    """Merge the first two axes."""
    return x.reshape(-1, *x.shape[2:])


def _enough(features_PSD: np.ndarray) -> bool:
    prompts, seeds, width = features_PSD.shape
    return prompts * seeds > width


def _half(features_PSD: np.ndarray) -> np.ndarray:
    return features_PSD[:, : features_PSD.shape[1] // 2]


def _varies(x_PSD: np.ndarray) -> bool:
    return bool(np.any(x_PSD != x_PSD[:, :1]))
