"""Noise retrieval: noises selected by the teacher's pictures, tried with another model.

For a caption that leaves an attribute open and a word of that attribute, the noises from which the
teacher draws the word are selected from a library. The metric is how often another model draws the
word from them, over all captions, attributes and words, weighted by the number of selected noises.
L noises, C captions that share them, A attributes; words are strings, "" where a picture shows
nothing.
"""

from collections.abc import Sequence

import numpy as np

from gadjax.evaluation.statistics import Estimate, bootstrap, ratio


def retrieval(
    row_CLA: np.ndarray, teacher_CLA: np.ndarray, open_CA: np.ndarray, attributes: Sequence[int]
) -> tuple[Estimate, Estimate] | None:
    """Retrieval rate of a row, and its chance level.

    Chance is how often the row draws the same words from all other noises of the library, in the
    same proportion of captions and words: the expected rate of noises without meaning.

    Args:
      row_CLA: words of the row's pictures.
      teacher_CLA: words of the teacher's pictures.
      open_CA: attributes that each caption leaves open.
      attributes: indices of the attributes to include.
    Returns: (rate, chance) with intervals over noises; None where the teacher draws no word.
    """
    selected, drawn = [], []
    for a in attributes:
        asked_CL = open_CA[:, a, None] & (teacher_CLA[:, :, a] != "")
        for word in np.unique(teacher_CLA[:, :, a][asked_CL]):
            selected.append(asked_CL & (teacher_CLA[:, :, a] == word))
            drawn.append(row_CLA[:, :, a] == word)
    if not selected:
        return None
    # [L, queries], a query being a word under a caption.
    selected, drawn = (np.concatenate(x).T.astype(float) for x in (selected, drawn))
    asked_L, hits_LL = selected.sum(1), selected @ drawn.T
    rate = ratio(np.diagonal(hits_LL), asked_L)
    # A noise drawn twice in a resample is no other noise: pairs of a noise with itself are removed.
    np.fill_diagonal(hits_LL, 0)

    def chance(noises):
        rows = noises.reshape(-1, len(selected))
        times = np.array([np.bincount(row, minlength=len(selected)) for row in rows])
        hits = np.einsum("ri,ij,rj->r", times, hits_LL, times, optimize=True)
        asked = (times * asked_L * (len(selected) - times)).sum(1)
        # A resample without any selected noise gives no value.
        return (hits / np.where(asked == 0, np.nan, asked)).reshape(noises.shape[:-1])

    return rate, bootstrap(chance, np.arange(len(selected)))
