"""Which text encoder and tokenizer a pipeline folder has, as a few digits."""

import hashlib
from pathlib import Path

import numpy as np

from gadjax.convert.files import open_weights
from gadjax.convert.layout import Tensor
from gadjax.convert.orbax_folder import is_own, read_manifest
from gadjax.errors import InputError

LOOKED_AT = 64  # bytes of each tensor


def text_fingerprint(
    folder: Path, *, variant: str | None = None, allow_pickle: bool = False, dtype=None
) -> str:
    """32 hex digits for what turns a prompt into embeddings, without reading the weights.

    They change with the text encoder's config.json, any file of the tokenizer, and the name,
    shape, dtype or (in safetensors) first bytes of any of the encoder's tensors. dtype: as if
    cast to it.
    Raises: InputError for a folder without them.
    """
    folder = Path(folder)
    if is_own(folder):
        return read_manifest(folder)["text"]
    files = sorted(path for path in (folder / "tokenizer").glob("*") if path.is_file())
    if not files:
        raise InputError(f"{folder / 'tokenizer'}: found no files; expected those of a tokenizer")
    digest = hashlib.blake2b(digest_size=16)
    weights = open_weights(folder / "text_encoder", variant, allow_pickle=allow_pickle)
    for path in [folder / "text_encoder" / "config.json", *files]:
        digest.update(f"{path.name}\0".encode() + _bytes(path))
    for key, entry in sorted(weights.entries.items()):
        digest.update(f"{key}\0{entry.dtype}\0{entry.shape}\0".encode())
        if isinstance(entry, Tensor):
            size = min(LOOKED_AT, entry.nbytes)
            digest.update(np.fromfile(entry.path, np.uint8, size, offset=entry.offset))
    if dtype is not None:
        digest.update(str(np.dtype(dtype)).encode())
    return digest.hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return hashlib.blake2b(path.read_bytes()).digest()
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}; expected a file to read") from error
