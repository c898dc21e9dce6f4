"""Seed probe: a classifier that names the noise from which a picture was drawn.

GAD's self-identifiability and teacher alignment are the accuracies of such a classifier on the
model's own pictures, and of the teacher's classifier on a student's; the paper's classifier, seeds
and prompts are not published, so these values are not those of its table. P prompts, of which all
start from the same S noises; D features.
"""

import numpy as np

FOLDS = 4  # groups of prompts; each is tested by a classifier of the others


def seed_probe(fitted_PSD: np.ndarray, tested_PSD: np.ndarray) -> np.ndarray:
    """Share of a prompt's tested pictures whose noise is named: [P]; chance 1 / S.

    Nearest mean of a noise's pictures over the fitted prompts, in units of the standard deviation
    within noises, by feature; of every picture the mean over its prompt's noises is subtracted
    first, since prompts differ more than noises do. No prompt is both fitted and tested.

    Args:
      fitted_PSD: features of the model that the classifier is of.
      tested_PSD: features of the tested model, from the same prompts and noises.
    """
    fitted, tested = (_centred(x) for x in (fitted_PSD, tested_PSD))
    count, seeds = fitted.shape[:2]
    hits_P = np.empty(count)
    folds = np.arange(count) % min(FOLDS, count)
    for fold in range(folds.max() + 1):
        training = fitted[folds != fold]
        means_SD = training.mean(0)
        deviation_D = np.sqrt(np.square(training - means_SD).mean((0, 1)))
        deviation_D = np.maximum(deviation_D, 1e-6 * max(deviation_D.max(), 1e-12))
        scaled = tested[folds == fold] / deviation_D
        distances = _squared_distances(scaled, means_SD / deviation_D)
        hits_P[folds == fold] = (distances.argmin(-1) == np.arange(seeds)).mean(-1)
    return hits_P


def low_pass(images_NHWC: np.ndarray, side: int = 16) -> np.ndarray:
    """Mean colours of at most `side` x `side` blocks: [N, values]; layout, without detail."""
    x = np.asarray(images_NHWC, np.float32)
    for axis in (1, 2):
        size = x.shape[axis]
        blocks = min(side, size)
        starts = np.arange(blocks) * size // blocks
        counts = np.diff(starts, append=size).astype(np.float32)
        sums = np.add.reduceat(x, starts, axis=axis)
        x = sums / counts.reshape([-1 if a == axis else 1 for a in range(4)])
    return x.reshape(len(x), -1)


def _centred(x_PSD: np.ndarray) -> np.ndarray:
    x = np.asarray(x_PSD, np.float64)
    return x - x.mean(1, keepdims=True)


def _squared_distances(x_PSD: np.ndarray, y_SD: np.ndarray) -> np.ndarray:
    return (x_PSD**2).sum(-1)[..., None] + (y_SD**2).sum(-1) - 2 * x_PSD @ y_SD.T
