"""Fingerprints of training data, to detect data that changed under the same name."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gadjax.data.embeddings import Embeddings
from gadjax.data.images import Pictures
from gadjax.errors import InputError

MAX_FILES = 100_000  # whose size is read
MAX_ROWS = 256  # of an array that are read
THREADS = 32  # on network storage every size is a round trip


def fingerprint_prompts(prompts: Sequence[str]) -> str:
    """Fingerprint of the prompts in their order."""
    return _digest(text.encode() for text in prompts)


def fingerprint_pictures(pictures: Pictures) -> str:
    """Fingerprint of all names and captions, and of the sizes of up to MAX_FILES files.

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
        return _digest([*texts, *pool.map(size, _evenly_spaced(len(pictures.names), MAX_FILES))])


def fingerprint_embeddings(embeddings: Embeddings) -> str:
    """Fingerprint of prompts and origin, and of up to MAX_ROWS rows of every array."""
    arrays = (
        embeddings.text_NLD,
        embeddings.mask_NL,
        embeddings.pooled_NP,
        embeddings.latent_NHWC,
    )
    rows = (
        array[row].tobytes()
        for array in arrays
        if array is not None
        for row in _evenly_spaced(len(array), MAX_ROWS)
    )
    texts = (*embeddings.prompts, str(embeddings.origin))
    return _digest([*(text.encode() for text in texts), *rows])


def _evenly_spaced(count: int, limit: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int)).tolist()


def _digest(parts: Iterable[bytes]) -> str:
    """Digest of byte strings in their order: 32 hexadecimal digits (BLAKE2b)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
