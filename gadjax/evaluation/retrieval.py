"""Whether a noise that was chosen for what the teacher draws from it does the same elsewhere.

Noise retrieval: for a caption that leaves an attribute open and a word of it, the noises from
which the teacher draws that word are looked up in a library; how often does another model draw it
from them? Over all captions, attributes and words, each as often as it was looked up. L noises, C
captions that share them, A attributes; words are strings, "" where a picture shows nothing.
"""

from collections.abc import Sequence

import numpy as np

from gadjax.evaluation.statistics import Estimate, bootstrap, ratio


def retrieval(
    row_CLA: np.ndarray, teacher_CLA: np.ndarray, open_CA: np.ndarray, attributes: Sequence[int]
) -> tuple[Estimate, Estimate] | None:
    """How often the row draws the wanted word from the noises chosen for it, and from others.

    The second is chance: how often the row draws that word from all other noises of the library,
    in the same proportion of captions and words; what is expected of noises that mean nothing.
    Intervals over noises. None where the teacher draws no word.
    """
    wanted, drawn = [], []
    for a in attributes:
        asked_CL = open_CA[:, a, None] & (teacher_CLA[:, :, a] != "")
        for word in np.unique(teacher_CLA[:, :, a][asked_CL]):
            wanted.append(asked_CL & (teacher_CLA[:, :, a] == word))
            drawn.append(row_CLA[:, :, a] == word)
    if not wanted:
        return None
    # [L, queries], a query being a word under a caption.
    wanted, drawn = (np.concatenate(x).T.astype(float) for x in (wanted, drawn))
    asked_L, hits_LL = wanted.sum(1), wanted @ drawn.T
    rate = ratio(np.diagonal(hits_LL), asked_L)
    # A noise drawn twice in a resample is no other noise, so that pairs of one with itself go.
    np.fill_diagonal(hits_LL, 0)

    def chance(noises):
        rows = noises.reshape(-1, len(wanted))
        times = np.array([np.bincount(row, minlength=len(wanted)) for row in rows])
        hits = np.einsum("ri,ij,rj->r", times, hits_LL, times, optimize=True)
        asked = (times * asked_L * (len(wanted) - times)).sum(1)
        # A resample may hold no noise that was chosen for anything; it then says nothing.
        return (hits / np.where(asked == 0, np.nan, asked)).reshape(noises.shape[:-1])

    return rate, bootstrap(chance, np.arange(len(wanted)))
