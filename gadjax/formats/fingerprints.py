"""Which text encoders, tokenizers and autoencoder a pipeline folder has, as a few digits each."""

import hashlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import Component
from gadjax.formats.orbax_folder import is_gadjax_folder, read_manifest
from gadjax.formats.safetensors_file import Tensor
from gadjax.formats.state_dict import tensors_from_params
from gadjax.formats.weights import component_variant, fingerprint, open_weights
from gadjax.io.untrusted import check_no_escape, is_macos_metadata, open_file

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
    if is_gadjax_folder(folder):
        return read_manifest(folder)["text"]
    digest = hashlib.blake2b(digest_size=16)
    # Their numbers end the names: the first is text_encoder with tokenizer.
    numbers = [path.name.removeprefix("text_encoder") for path in folder.glob("text_encoder*")]
    for number in sorted({"", *numbers}):
        encoder, tokenizer = folder / f"text_encoder{number}", folder / f"tokenizer{number}"
        for part in (encoder, tokenizer):
            check_no_escape(part, folder)
        files = sorted(
            path
            for path in tokenizer.glob("*")
            if path.is_file() and not is_macos_metadata(path.name)
        )
        if not files:
            raise InputError(f"{tokenizer}: found no files; expected those of a tokenizer")
        weights = open_weights(
            encoder,
            component_variant(encoder, variant),
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


def image_fingerprint(vae: Component) -> str:
    """32 hex digits for what turns a picture into a latent: config.json's values and the weights.

    Unlike `text_fingerprint` it reads all weights, which are few, and are needed anyway.
    """
    config = np.frombuffer(repr(asdict(vae.spec)).encode(), np.uint8)
    tensors = tensors_from_params(vae.params, vae.keymap)
    return fingerprint([("config.json", config), *tensors])
