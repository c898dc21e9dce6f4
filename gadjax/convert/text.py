"""Which text encoders and tokenizers a pipeline folder has, as a few digits."""

import hashlib
from pathlib import Path

import numpy as np

from gadjax.convert.files import open_weights, variant_of
from gadjax.convert.layout import Tensor
from gadjax.convert.orbax_folder import is_own, read_manifest
from gadjax.errors import InputError
from gadjax.reading import check_inside, is_leftover, open_file

LOOKED_AT = 64  # bytes of each tensor


def text_fingerprint(
    folder: Path, *, variant: str | None = None, allow_pickle: bool = False, dtype=None
) -> str:
    """32 hex digits for what turns a prompt into embeddings, without reading the weights.

    They change with the config.json of any text encoder, any file of a tokenizer, and the name,
    shape, dtype or (in safetensors) first bytes of any of an encoder's tensors. dtype: as if
    cast to it.
    Raises: InputError for a folder without them.
    """
    folder = Path(folder)
    if is_own(folder):
        return read_manifest(folder)["text"]
    digest = hashlib.blake2b(digest_size=16)
    # Their numbers end the names: the first is text_encoder with tokenizer.
    numbers = [path.name.removeprefix("text_encoder") for path in folder.glob("text_encoder*")]
    for number in sorted({"", *numbers}):
        encoder, tokenizer = folder / f"text_encoder{number}", folder / f"tokenizer{number}"
        for part in (encoder, tokenizer):
            check_inside(part, folder)
        files = sorted(
            path for path in tokenizer.glob("*") if path.is_file() and not is_leftover(path.name)
        )
        if not files:
            raise InputError(f"{tokenizer}: found no files; expected those of a tokenizer")
        weights = open_weights(
            encoder,
            variant_of(encoder, variant),
            library="transformers",
            allow_pickle=allow_pickle,
        )
        for path in [encoder / "config.json", *files]:
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
    with open_file(path, "a file to read") as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()
