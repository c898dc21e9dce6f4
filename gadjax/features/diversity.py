"""Diversity among the seeds of a prompt, and seed alignment. P prompts, S seeds, D values."""

import numpy as np

from gadjax.io.image_grid import from_uint8


def vendi(features_PSD: np.ndarray) -> np.ndarray:
    """Vendi score of each prompt [P], from 1 (all alike) to S (all different).

    exp of the entropy of the eigenvalues of K / S, K the cosine similarity of the features
    (Friedman and Dieng 2023, https://arxiv.org/abs/2210.02410). The mean entropy rises with S to
    that of infinitely many seeds, since entropy is concave: the score is a lower bound.
    """
    x = np.asarray(features_PSD, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    values = np.linalg.eigvalsh(x @ x.swapaxes(1, 2) / x.shape[1])
    values = np.maximum(values, 1e-15)
    return np.exp(-(values * np.log(values)).sum(-1))


def vendi_corrected(features_PSD: np.ndarray) -> np.ndarray:
    """Vendi score with the bias of its entropy removed to first order in 1 / S: [P].

    Jackknife (Quenouille 1956): S H - (S - 1) mean of H over the sets without one seed, for the
    entropy H of `vendi`. Still below the limit where that is far above S, and of larger variance.
    """
    seeds = features_PSD.shape[1]
    without = [np.log(vendi(np.delete(features_PSD, seed, axis=1))) for seed in range(seeds)]
    entropy = seeds * np.log(vendi(features_PSD)) - (seeds - 1) * np.mean(without, axis=0)
    return np.exp(entropy)


def squared_distances(a_PSD: np.ndarray, b_PSD: np.ndarray) -> np.ndarray:
    """Mean squared difference between every picture of a and every picture of b: [P, S, S]; of
    uint8 as values in [-1, 1]."""
    # Prompt by prompt, so that large pictures are not all converted at once; differences rather
    # than |a|^2 - 2ab + |b|^2, which is never exactly zero between equal pictures.
    out = np.empty((len(a_PSD), a_PSD.shape[1], b_PSD.shape[1]))
    for p, pair in enumerate(zip(a_PSD, b_PSD, strict=True)):
        a_SD, b_SD = map(from_uint8, pair)
        for s, a_D in enumerate(a_SD):
            out[p, s] = np.square(b_SD - a_D).mean(-1)
    return out


def pairwise_distance(x_PSD: np.ndarray) -> np.ndarray:
    """Root mean square difference between seeds, mean over pairs of different seeds: [P]."""
    seeds = x_PSD.shape[1]
    distances = np.sqrt(squared_distances(x_PSD, x_PSD))
    return distances.sum((1, 2)) / (seeds * (seeds - 1))


def seed_alignment(student_PSD: np.ndarray, teacher_PSD: np.ndarray) -> np.ndarray:
    """Seed alignment: share of a prompt's seeds whose student picture is nearest to the teacher's
    picture of the same seed, among the teacher's S pictures: [P], chance 1 / S. Ties count in
    part."""
    distances = squared_distances(student_PSD, teacher_PSD)
    nearest = distances == distances.min(-1, keepdims=True)
    same_seed = np.einsum("pss->ps", nearest)
    return (same_seed / nearest.sum(-1)).mean(-1)


def relative_difference(student_PSD: np.ndarray, teacher_PSD: np.ndarray) -> np.ndarray:
    """Difference between student and teacher at the same noise: root mean square, mean over seeds,
    over the teacher's `pairwise_distance`, mean over prompts: [P]. 0 = the same pictures, 1 = as
    unlike as the teacher's pictures from two noises."""
    same_seed = np.einsum("pss->ps", squared_distances(student_PSD, teacher_PSD))
    scale = pairwise_distance(teacher_PSD).mean()
    return np.sqrt(same_seed).mean(-1) / (scale if scale > 0 else 1.0)


def coverage(words_PSA: np.ndarray, open_PA: np.ndarray) -> np.ndarray:
    """Coverage: number of different words that a prompt's seeds show for an attribute that it
    leaves open, mean over those attributes: [Q] for the Q prompts that leave any open. "" is no
    word."""
    counts = np.array(
        [[len(set(words_S) - {""}) for words_S in words_SA.T] for words_SA in words_PSA]
    )
    has_open = open_PA.any(1)
    return (counts * open_PA).sum(1)[has_open] / open_PA.sum(1)[has_open]


def cosine_diversity(features_PSD: np.ndarray) -> np.ndarray:
    """1 - mean cosine over pairs of different seeds: [P]. Its mean does not depend on S.

    DP-DMD's measure (Wu et al. 2026, arXiv:2602.03139): features raw, not centred.
    """
    return 1 - _between_seeds(_cosines(features_PSD))


def effective_number(features_PSD: np.ndarray) -> np.ndarray:
    """Effective number of different pictures 1 / mean cosine^2 over pairs of different seeds: [P].

    The population's value of the Vendi score of order 2 (RKE, Jalali et al. 2023), which the score
    itself, with the diagonal, stays below at few seeds.
    """
    return 1 / np.maximum(_between_seeds(_cosines(features_PSD) ** 2), 1e-12)


def _cosines(features_PSD: np.ndarray) -> np.ndarray:
    x = np.asarray(features_PSD, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return x @ x.swapaxes(1, 2)


def _between_seeds(values_PSS: np.ndarray) -> np.ndarray:
    """Mean of [P, S, S] without the diagonal: [P]."""
    seeds = values_PSS.shape[1]
    return (values_PSS.sum((1, 2)) - np.einsum("pss->p", values_PSS)) / (seeds * (seeds - 1))
