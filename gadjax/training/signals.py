"""Signals of collapse, from the latents and pictures that a preview has drawn anyway.

Losses are blind to collapse and to saturation; these numbers are not, each read beside the
teacher's from the same prompts and noises. P prompts at S noises each.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gadjax.features.diversity import seed_alignment, vendi
from gadjax.features.network import FolderExtractor
from gadjax.io.image_grid import to_uint8

CELLS = 4  # side of the grid to which latents are pooled
DARK, BRIGHT = 2, 253  # levels of 255 outside of which a value counts as clipped


class Drawn(NamedTuple):
    """Clean latents and pictures in [-1, 1] of one network, and features of the pictures; None
    without an extractor."""

    x0_PSHWC: np.ndarray
    images_PSHWC: np.ndarray
    features_PSD: np.ndarray | None = None


def extract(extractor: FolderExtractor, images_PSHWC: np.ndarray) -> np.ndarray:
    """Features [P, S, D] of pictures in [-1, 1]; NaN for a picture that is not finite."""
    images_NHWC = images_PSHWC.reshape(-1, *images_PSHWC.shape[2:])
    features_ND = extractor(to_uint8(images_NHWC))
    features_ND[~np.isfinite(images_NHWC).all((1, 2, 3))] = np.nan
    return features_ND.reshape(*images_PSHWC.shape[:2], -1)


def measure(drawn: Drawn) -> dict[str, float]:
    """Signals of one network's pictures, by name.

    seed_similarity: cosine between the latents of a prompt's different noises, pooled to
      CELLS x CELLS and less each latent's own spatial mean, mean over pairs; none for one noise.
    x0_rms: root mean square of the latents.
    low_band: share of the latents' variance over space that is left after pooling.
    saturation: mean over pixels of the largest less the smallest colour value, of 1.
    contrast: standard deviation of the grey value over a picture, of 1.
    clipped: share of colour values below DARK or above BRIGHT (0, 1, 254, 255).
    vendi: Vendi score of a prompt's noises by features, mean over prompts; none without features.
    """
    seeds = drawn.x0_PSHWC.shape[1]
    x = np.asarray(drawn.x0_PSHWC, np.float64).reshape(-1, *drawn.x0_PSHWC.shape[2:])
    images_NHWC = drawn.images_PSHWC.reshape(-1, *drawn.images_PSHWC.shape[2:])
    colours = np.array([_colours(to_uint8(image)) for image in images_NHWC]).mean(0)
    pooled = _centred(_pooled(x))
    signals = {
        "x0_rms": np.sqrt(np.square(x).mean()),
        "low_band": np.square(pooled).mean() / _positive(np.square(_centred(x)).mean()),
        **dict(zip(("saturation", "contrast", "clipped"), colours, strict=True)),
    }
    if seeds > 1:
        unit = pooled.reshape(-1, seeds, pooled[0].size)
        unit = unit / _positive(np.linalg.norm(unit, axis=-1, keepdims=True))
        cosines = unit @ unit.swapaxes(1, 2)
        pairs = cosines.sum((1, 2)) - np.einsum("pss->p", cosines)
        signals["seed_similarity"] = (pairs / (seeds * (seeds - 1))).mean()
        if drawn.features_PSD is not None:
            signals["vendi"] = _of_features(vendi, drawn)
    return {name: float(value) for name, value in signals.items()}


def compare(student: Drawn, teacher: Drawn) -> dict[str, float]:
    """Signals of what a noise means to both networks, by name; none for one noise of a prompt.

    same_seed: see `same_seed`.
    alignment: `seed_alignment` by features, mean over prompts; none without features.
    """
    if student.x0_PSHWC.shape[1] < 2:
        return {}
    signals = {"same_seed": same_seed(student, teacher)}
    if student.features_PSD is not None:
        signals["alignment"] = _of_features(seed_alignment, student, teacher)
    return signals


def same_seed(student: Drawn, teacher: Drawn) -> float:
    """Share of the seed that student and teacher have in common: (a - b) / (1 - b).

    a is the cosine between their latents from the same noise, b that between their latents from
    different noises of a prompt, each latent less its own spatial mean; means over noises and
    pairs. 1 = the teacher's layouts, 0 = no more like them than those of other noises.

    Args:
      student, teacher: latents of the same prompts and noises, two or more of each prompt.
    """
    seeds, units = student.x0_PSHWC.shape[1], []
    for drawn in (student, teacher):
        x = np.asarray(drawn.x0_PSHWC, np.float64)
        x = (x - x.mean((2, 3), keepdims=True)).reshape(*x.shape[:2], -1)
        units.append(x / _positive(np.linalg.norm(x, axis=-1, keepdims=True)))
    cosines_PSS = units[0] @ units[1].swapaxes(1, 2)
    same = np.einsum("pss->", cosines_PSS)
    other = (cosines_PSS.sum() - same) / (len(cosines_PSS) * seeds * (seeds - 1))
    same = same / (len(cosines_PSS) * seeds)
    return float((same - other) / _positive(1 - other))


def _of_features(statistic: Callable[..., np.ndarray], *drawn: Drawn) -> float:
    """Mean of a statistic of features [P]; NaN where one of them is not finite."""
    features = [network.features_PSD for network in drawn]
    finite = all(np.isfinite(x).all() for x in features)
    return float(statistic(*features).mean()) if finite else np.nan


def _colours(image_HWC: np.ndarray) -> tuple[float, float, float]:
    """Saturation, contrast and clipped share of one uint8 picture."""
    clipped = np.mean((image_HWC < DARK) | (image_HWC > BRIGHT))
    colours_HWC = image_HWC / 255
    return np.mean(np.ptp(colours_HWC, axis=-1)), colours_HWC.mean(-1).std(), clipped


def _pooled(x_NHWC: np.ndarray) -> np.ndarray:
    for axis in (1, 2):
        parts = np.array_split(x_NHWC, min(CELLS, x_NHWC.shape[axis]), axis)
        x_NHWC = np.concatenate([part.mean(axis, keepdims=True) for part in parts], axis)
    return x_NHWC


def _centred(x_NHWC: np.ndarray) -> np.ndarray:
    return x_NHWC - x_NHWC.mean((1, 2), keepdims=True)


def _positive(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, np.finfo(np.float64).tiny)
