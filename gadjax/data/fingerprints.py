"""What a run's data say, as a few digits: data that became others under their name are found."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gadjax.data.embeddings import Embeddings
from gadjax.data.images import Pictures
from gadjax.errors import InputError

MOST = 100_000  # pictures whose size is looked at
ROWS = 256  # of an array that are read
THREADS = 32  # on network storage a size is a round trip


def fingerprint_prompts(prompts: Sequence[str]) -> str:
    return _digest(text.encode() for text in prompts)


def fingerprint_pictures(pictures: Pictures) -> str:
    """Of all names and captions, and of the files' sizes: of many pictures, evenly chosen ones.

    Raises: InputError for a file that is gone.
    """

    def size(number: int) -> bytes:
        path = pictures.folder / pictures.names[number]
        try:
            return str(path.stat().st_size).encode()
        except OSError as error:
            raise InputError(f"{path}: found {error.strerror}; expected a picture") from None

    texts = (os.fsencode(text) for text in (*pictures.names, *pictures.captions))
    with ThreadPoolExecutor(THREADS) as pool:
        return _digest([*texts, *pool.map(size, _chosen(len(pictures.names), MOST))])


def fingerprint_embeddings(found: Embeddings) -> str:
    """Of the prompts, of what wrote the folder, and of evenly chosen rows of its arrays."""
    arrays = found.text_NLD, found.mask_NL, found.pooled_NP, found.latent_NHWC
    rows = (
        array[row].tobytes()
        for array in arrays
        if array is not None
        for row in _chosen(len(array), ROWS)
    )
    texts = (*found.prompts, str(found.origin))
    return _digest([*(text.encode() for text in texts), *rows])


def _chosen(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _digest(parts: Iterable[bytes]) -> str:
    """32 hex digits for byte strings in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
