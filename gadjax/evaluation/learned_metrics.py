"""Metrics by named extractors and scorers, their titles and meanings.

P prompts, S seeds, D features. Names are NAME/metric, NAME being the user's.
"""

from collections.abc import Mapping

import numpy as np

from gadjax.evaluation.frechet import frechet, frechet_limit
from gadjax.evaluation.learned import PIXELS, LearnedOutputs
from gadjax.evaluation.metric_catalogue import FRECHET_LIMIT, VENDI_CORRECTED, Metric
from gadjax.evaluation.metrics import absent_distances
from gadjax.evaluation.oracles import World
from gadjax.evaluation.seed_probe import seed_probe
from gadjax.evaluation.set_metrics import NEIGHBOURS, cmmd, kid, support_overlap
from gadjax.evaluation.statistics import Estimate, mean, ratio
from gadjax.features.diversity import (
    cosine_diversity,
    effective_number,
    seed_alignment,
    vendi,
    vendi_corrected,
)
from gadjax.features.scorers import MEANINGS

GROUP = "learned"
SUMMARY_ENDINGS = ("/diversity_ratio", "/score", "/win_rate")
CMMD_KIND = "clip projected"  # kind and vector of the extractors that CMMD is of


def learned_metrics(
    row: LearnedOutputs, teacher: LearnedOutputs, world: World
) -> dict[str, Estimate]:
    """Every metric of a row; the teacher is not compared with itself.

    Args:
      row: the row's features and scores.
      teacher: the teacher's, with those at other seeds.
      world: the named extractors.
    """
    metrics, is_teacher = {}, row is teacher
    for name, x_PSD in row.features.items():
        metrics |= {f"{name}/{k}": v for k, v in _diversity(x_PSD, teacher.features[name]).items()}
        if name in teacher.others:
            kind = f"{world.features[name].kind} {world.features[name].vector}"
            distances = _set_distances(x_PSD, teacher.others[name], kind)
            metrics |= {f"{name}/{key}": Estimate(value) for key, value in distances.items()}
        if not is_teacher:
            metrics[f"{name}/alignment"] = mean(seed_alignment(x_PSD, teacher.features[name]))
            metrics[f"{name}/cosine"] = mean(_cosine(x_PSD, teacher.features[name]))
    for name, scores_PS in row.scores.items():
        metrics[f"{name}/score"] = mean(scores_PS.mean(1))
        if not is_teacher:
            metrics[f"{name}/win_rate"] = mean(_wins(scores_PS, teacher.scores[name]))
    if row.low_pass_PSD is not None and len(row.low_pass_PSD) > 1:
        probed = row.features | {PIXELS: row.low_pass_PSD}
        references = teacher.features | {PIXELS: teacher.low_pass_PSD}
        for name, x_PSD in probed.items():
            metrics[f"{name}/seed_probe"] = mean(seed_probe(x_PSD, x_PSD))
            if not is_teacher:
                metrics[f"{name}/seed_probe_teacher"] = mean(seed_probe(references[name], x_PSD))
    if is_teacher:
        metrics = {key: value for key, value in metrics.items() if not key.endswith("_ratio")}
    return metrics


def _diversity(x_PSD: np.ndarray, teacher_PSD: np.ndarray) -> dict[str, Estimate]:
    metrics, seeds = {}, x_PSD.shape[1]
    for key, statistic in (
        ("diversity", cosine_diversity),
        ("effective_number", effective_number),
        (f"vendi@{seeds}", vendi),
    ):
        values, reference = statistic(x_PSD), statistic(teacher_PSD)
        metrics[key] = mean(values)
        if reference.any():
            metrics[f"{key}_ratio"] = ratio(values, reference)
    metrics[f"vendi@{seeds}_corrected"] = mean(vendi_corrected(x_PSD))
    return metrics


def _set_distances(x_PSD: np.ndarray, others_PSD: np.ndarray, kind: str) -> dict[str, float]:
    x, others = (a.reshape(-1, a.shape[-1]) for a in (x_PSD, others_PSD))
    values = {"kid": kid(x, others)}
    missing = absent_distances(x_PSD)
    if "frechet" not in missing:
        values["frechet"] = frechet(x, others)
    if "frechet_limit" not in missing:
        values["frechet_limit"] = frechet_limit(x_PSD, others_PSD)
    if kind == CMMD_KIND:
        values["cmmd"], values["cmmd_v"] = cmmd(x, others), cmmd(x, others, unbiased=False)
    if len(x) > NEIGHBOURS:
        values |= support_overlap(others, x)._asdict()
    return values


def _cosine(x_PSD: np.ndarray, y_PSD: np.ndarray) -> np.ndarray:
    """Mean cosine of pictures from the same noise: [P]."""
    x, y = (np.asarray(a, np.float64) for a in (x_PSD, y_PSD))
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return ((x * y).sum(-1) / np.maximum(norms, 1e-12)).mean(1)


def _wins(scores_PS: np.ndarray, teacher_PS: np.ndarray) -> np.ndarray:
    """Share of a prompt's noises whose picture scores more than the teacher's; ties count half."""
    return ((scores_PS > teacher_PS) + 0.5 * (scores_PS == teacher_PS)).mean(1)


def learned_catalogue(world: World, seeds: int, shared_noise: bool) -> dict[str, Metric]:
    """Metrics of named extractors and scorers, in the report's order.

    Args:
      world: its extractors and scorers.
      seeds: S, which enters the name of the Vendi score.
      shared_noise: whether all prompts start from the same noises.
    """
    metrics = {}
    for name, extractor in world.features.items():
        for key, (title, meaning) in _MEANINGS.items():
            if key.startswith("cmmd") and f"{extractor.kind} {extractor.vector}" != CMMD_KIND:
                continue
            key, title = (text.replace("@S", f"@{seeds}") for text in (key, title))
            metrics[f"{name}/{key}"] = Metric(f"{name}: {title}", meaning, GROUP)
        if shared_noise:
            metrics |= _probe(name)
    for name, scorer in world.scores.items():
        metrics[f"{name}/score"] = Metric(name, f"mean; {MEANINGS[scorer.kind]}", GROUP)
        metrics[f"{name}/win_rate"] = Metric(
            f"{name}: win rate against the teacher",
            "share of the pictures that score more than the teacher's from the same noise; 0.5 = "
            "as often as not",
            GROUP,
        )
    return metrics | (_probe(PIXELS) if shared_noise else {})


def _probe(name: str) -> dict[str, Metric]:
    return {
        f"{name}/seed_probe": Metric(
            f"{name}: seed probe, self",
            "share of the pictures whose noise a classifier names that knows this model's pictures "
            "of other prompts (nearest mean; GAD's self-identifiability, whose classifier is not "
            "published); chance is 1 / seeds",
            GROUP,
        ),
        f"{name}/seed_probe_teacher": Metric(
            f"{name}: seed probe, teacher's",
            "the same with the classifier of the teacher's pictures (GAD's teacher alignment)",
            GROUP,
        ),
    }


def absent_learned(
    catalogue: Mapping[str, Metric], taken: set[str], teacher: LearnedOutputs
) -> dict[str, str]:
    """Reason for every metric of `learned_catalogue` that no row has."""
    absent = {}
    for name in catalogue:
        if name in taken:
            continue
        extractor, key = name.rsplit("/", 1)
        features = teacher.features.get(extractor)
        count = 0 if features is None else features[..., 0].size
        if key.startswith("frechet"):
            absent[name] = absent_distances(features)[key]
        elif key in ("precision", "recall", "density", "coverage"):
            absent[name] = f"{count} pictures; takes more than {NEIGHBOURS}"
        elif key.endswith("_ratio"):
            absent[name] = "the teacher draws every seed alike"
        else:
            absent[name] = "one prompt; takes 2 or more"
    return absent


def describe_learned(world: World) -> dict[str, str]:
    """Model, preprocessing and fingerprint of every extractor and scorer, for the settings."""
    lines = {f"features {name}": str(extractor) for name, extractor in world.features.items()}
    for name, scorer in world.scores.items():
        cut = f"; {len(scorer.truncated)} prompts were truncated" if scorer.encode else ""
        lines[f"scores {name}"] = f"{scorer}{cut}"
    return lines


_FLOOR = "to the teacher's pictures at other seeds; the teacher's own value is the floor"
# Key -> title, meaning; @S stands for the number of seeds.
_MEANINGS = {
    "diversity": (
        "1 - cosine between seeds",
        "mean over pairs of pictures of one prompt, then over prompts, of raw features (DP-DMD's "
        "measure); it does not depend on the number of seeds",
    ),
    "diversity_ratio": (
        "1 - cosine / teacher's",
        "1 = as diverse as the teacher; more is no better",
    ),
    "effective_number": (
        "effective number",
        "1 / mean squared cosine between seeds, mean over prompts: Vendi's of order 2 without the "
        "diagonal, which depends little on the number of seeds",
    ),
    "effective_number_ratio": ("effective number / teacher's", "1 = as diverse as the teacher"),
    "vendi@S": (
        "Vendi@S",
        "of the seeds of a prompt, mean over prompts; it grows with the number of seeds, which "
        "stands behind the @, and is compared at equal numbers only",
    ),
    "vendi@S_corrected": ("Vendi@S, corrected", VENDI_CORRECTED),
    "vendi@S_ratio": ("Vendi@S / teacher's", "1 = as diverse as the teacher"),
    "alignment": (
        "seed alignment",
        "share of the pictures whose nearest among the teacher's of that prompt is the one from "
        "the same noise; chance is 1 / seeds",
    ),
    "cosine": ("cosine to the teacher's", "of the picture from the same noise, mean"),
    "frechet": ("Fréchet distance", _FLOOR),
    "frechet_limit": ("Fréchet distance, extrapolated", FRECHET_LIMIT),
    "kid": ("kernel distance", f"cubic kernel, unbiased (KID; KD on DINOv2), {_FLOOR}"),
    "cmmd": ("CMMD", f"without the diagonal, unbiased, {_FLOOR}; blind to spread"),
    "cmmd_v": ("CMMD, V", "with the diagonal, as published: larger by about 10 / pictures"),
    "precision": (
        "precision",
        f"share of the pictures in the support of the teacher's at other seeds, k = {NEIGHBOURS}",
    ),
    "recall": ("recall", "share of those in the support of these pictures"),
    "density": ("density", "how densely the pictures lie there; may exceed 1"),
    "coverage": ("coverage", "share of those with one of these pictures nearby"),
}
