"""Fingerprints of a pipeline folder's text encoders, tokenizers and autoencoder."""

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

HASHED_BYTES = 64  # per tensor


def text_fingerprint(
    folder: Path, *, variant: str | None = None, allow_pickle: bool = False, dtype=None
) -> str:
    """Fingerprint of text encoders and tokenizers: 32 hex digits, without reading all weights.

    It changes with the config.json of any text encoder, any file of a tokenizer, and the name,
    shape, dtype or (in safetensors) first bytes of any tensor of an encoder.

    Args:
      folder: a pipeline folder, diffusers' or gadjax's.
      variant: variant of the weight files.
      allow_pickle: also read torch's .bin.
      dtype: dtype that the encoders are cast to, which enters the fingerprint; None for none.

    Returns: the digits. In gadjax's folder they are those of its manifest, whatever `dtype` is.
    Raises: InputError for a folder without text encoders or tokenizers.
    """
    folder = Path(folder)
    if is_gadjax_folder(folder):
        return read_manifest(folder)["text"]
    digest = hashlib.blake2b(digest_size=16)
    # Names end in the number; the first encoder is text_encoder with tokenizer, without one.
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
                size = min(HASHED_BYTES, entry.nbytes)
                digest.update(np.fromfile(entry.path, np.uint8, size, offset=entry.offset))
    if dtype is not None:
        digest.update(str(np.dtype(dtype)).encode())
    return digest.hexdigest()


def _bytes(path: Path) -> bytes:
    with open_file(path, "a file to read") as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()


def image_fingerprint(vae: Component) -> str:
    """Fingerprint of the autoencoder: 32 hex digits of its configuration and weights.

    Unlike `text_fingerprint` it hashes all weights, which are few and have been read anyway.
    """
    config = np.frombuffer(repr(asdict(vae.spec)).encode(), np.uint8)
    tensors = tensors_from_params(vae.params, vae.keymap)
    return fingerprint([("config.json", config), *tensors])
