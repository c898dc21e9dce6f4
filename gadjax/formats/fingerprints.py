"""Fingerprints of a pipeline folder's text encoders, tokenizers and autoencoder."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
    folder: Path,
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
    dtype=None,
    changed: Mapping[str, Component] | None = None,
) -> str:
    """Fingerprint of text encoders and tokenizers: 32 hex digits, without reading all weights.

    It changes with the config.json of any text encoder, any file of a tokenizer, and the name,
    shape, dtype or (in safetensors) first bytes of any tensor of an encoder.

    Args:
      folder: a pipeline folder, diffusers' or gadjax's.
      variant: variant of the weight files.
      allow_pickle: also read torch's .bin.
      dtype: dtype that the encoders are cast to, which enters the fingerprint; None for none.
      changed: encoders with other parameters than their files, by name: the fingerprint is that of
        a diffusers folder with these.

    Returns: the digits. In gadjax's folder they are those of its manifest, whatever `dtype` is.
    Raises: InputError for a folder without text encoders or tokenizers.
    """
    folder = Path(folder)
    if is_gadjax_folder(folder):
        if changed:
            raise InputError(
                f"{folder}: found gadjax's own folder; expected a diffusers folder for other text "
                "encoders (gadjax convert writes one)"
            )
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
        entries = weights.entries
        if part := (changed or {}).get(encoder.name):
            entries = dict(tensors_from_params(part.params, part.keymap))
        for key, entry in sorted(entries.items()):
            digest.update(f"{key}\0{entry.dtype}\0{entry.shape}\0".encode())
            digest.update(_first_bytes(entry))
    if dtype is not None:
        digest.update(str(np.dtype(dtype)).encode())
    return digest.hexdigest()


def _first_bytes(entry: Tensor | np.ndarray | Any) -> bytes:
    """First bytes of a tensor's data; none of a tensor in a pickle."""
    if isinstance(entry, np.ndarray):
        return entry.reshape(-1)[:HASHED_BYTES].tobytes()[:HASHED_BYTES]
    if not isinstance(entry, Tensor):
        return b""
    size = min(HASHED_BYTES, entry.nbytes)
    return np.fromfile(entry.path, np.uint8, size, offset=entry.offset).tobytes()


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
