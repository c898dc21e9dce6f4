"""Cache of features by picture and extractor: a second run reads what the first computed.

One safetensors file for each extractor's fingerprint: "keys" (16 bytes for each picture) and
"features" [N, D].
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gadjax.errors import InputError
from gadjax.formats.safetensors_file import read_header, write_safetensors

KEY_BYTES = 16


def picture_key(image_HWC: np.ndarray) -> bytes:
    """Key of a uint8 picture: a hash of its size and its pixels."""
    digest = hashlib.blake2b(repr(image_HWC.shape).encode(), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(image_HWC))
    return digest.digest()


class FeatureCache:
    """Features [D] of pictures that an extractor has had, by their keys.

    Args:
      folder: of the cache files; made where it is missing.
      fingerprint: of the extractor, which names the file.
      width: number D of features.
    Raises: InputError for a file that is no such cache.
    """

    def __init__(self, folder: Path, fingerprint: str, width: int):
        self.path = Path(folder) / f"{fingerprint}.safetensors"
        self.width, self.changed = width, False
        self.rows: dict[bytes, np.ndarray] = {}
        if self.path.exists():
            self.rows = _read(self.path, width)

    def __call__(
        self, images_NHWC: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Features [N, D] of uint8 pictures; `compute` gets those that the cache does not have."""
        keys = [picture_key(image) for image in images_NHWC]
        missing = {key: i for i, key in enumerate(keys) if key not in self.rows}
        if missing:
            features_MD = compute(images_NHWC[list(missing.values())])
            self.rows |= dict(zip(missing, features_MD, strict=True))
            self.changed = True
        return np.stack([self.rows[key] for key in keys])

    def write(self) -> None:
        """Write the file, atomically, if there is anything new. Raises: OSError."""
        if not self.changed:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial-{os.getpid()}")
        keys = np.frombuffer(b"".join(self.rows), np.uint8).reshape(-1, KEY_BYTES)
        features = np.stack(list(self.rows.values())).astype(np.float32)
        try:
            write_safetensors(partial, {"keys": keys.copy(), "features": features})
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
        self.changed = False


def _read(path: Path, width: int) -> dict[bytes, np.ndarray]:
    entries = read_header(path)
    shapes = {name: (entry.shape, str(entry.dtype)) for name, entry in entries.items()}
    count = entries["keys"].shape[0] if "keys" in entries and entries["keys"].shape else 0
    expected = {
        "keys": ((count, KEY_BYTES), "uint8"),
        "features": ((count, width), "float32"),
    }
    if shapes != expected:
        raise InputError(f"{path}: found {shapes}; expected a cache of {width} features a picture")
    keys, features = entries["keys"].read(), entries["features"].read()
    if not np.isfinite(features).all():
        raise InputError(f"{path}: found features that are not finite; expected finite ones")
    return {row.tobytes(): value for row, value in zip(keys, features, strict=True)}
