"""Feature extractors from folders of weights: uint8 pictures to vectors.

Float32 throughout, products in full precision (a TPU's bfloat16 passes show in the third digit of
small differences); batches are split over the local devices, parameters are on every one of them.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.errors import InputError, check_choice
from gadjax.features.cache import FeatureCache
from gadjax.features.preprocessing import Recipe, read_recipe
from gadjax.formats.state_dict import check_dtypes, check_keys, place_tensors
from gadjax.formats.weights import Weights, fingerprint, open_weights
from gadjax.io.untrusted import check_files_no_escape, read_json
from gadjax.models.keymap import KeyMap
from gadjax.models.module import Functional, functional
from gadjax.models.vision.config import read_vision_config
from gadjax.models.vision.keymap import vision_keymap
from gadjax.models.vision.vit import build
from gadjax.parallel.sharding import batch_sharding, make_mesh, replicated
from gadjax.types import Params

BATCH = 32  # pictures at a time
VERSION = 1  # of the features' definition here; enters the fingerprint


@dataclass(frozen=True, eq=False)
class FolderExtractor:
    """Feature extractor: `extractor(images_NHWC uint8) -> features [N, D] float32`, not centred.

    Attributes:
      name: the user's, in flags and reports.
      kind: of the network: clip, siglip, dinov2, dinov3, inception.
      vector: which of its vectors.
      recipe: preprocessing, on the host.
      fingerprint: 32 hex digits of weights, vector, recipe and this code's version.
      width: number D of features.
      apply: prepared pictures [B, h, w, 3] -> [B, D]; pure and compiled.
      params: its parameters.
      batch: pictures at a time.
      cache: of features; None for none.
    """

    name: str
    kind: str
    vector: str
    recipe: Recipe
    fingerprint: str
    width: int
    apply: Callable[[Params, jax.Array], jax.Array]
    params: Params
    batch: int = BATCH
    cache: FeatureCache | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.vector}; {self.recipe}; fingerprint {self.fingerprint[:12]}"

    def __call__(self, images_NHWC: np.ndarray) -> np.ndarray:
        if images_NHWC.dtype != np.uint8:
            raise ValueError(f"pictures: found {images_NHWC.dtype}; expected uint8")
        if self.cache is None:
            return self.compute(images_NHWC)
        return self.cache(images_NHWC, self.compute)

    def compute(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Features without the cache: batch by batch, the last one padded."""
        mesh = make_mesh({"data": -1}, jax.local_devices())
        batch = -(-self.batch // mesh.size) * mesh.size
        params = jax.device_put(self.params, replicated(mesh))
        parts = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for start in range(0, len(images_NHWC), batch):
                part = images_NHWC[start : start + batch]
                prepared = np.stack(list(threads.map(self.recipe, part)))
                padded = np.pad(prepared, [(0, batch - len(part))] + [(0, 0)] * 3)
                x = jax.device_put(padded, batch_sharding(mesh))
                parts.append(np.asarray(self.apply(params, x))[: len(part)])
        return np.concatenate(parts)


def load_extractor(
    name: str, folder: Path, vector: str | None = None, recipe: str | None = None
) -> FolderExtractor:
    """Load a feature extractor from a folder of transformers' (config.json, model.safetensors).

    Args:
      name: for reports and messages.
      folder: of a vision model, or of a model of pictures and texts; the kind of the network
        comes from its config.json.
      vector: which vector; by default the projected or pooled one.
      recipe: named preprocessing in place of the folder's preprocessor_config.json.

    Raises: InputError for files that are missing, malformed or unsupported.
    """
    folder = Path(folder)
    cfg = read_config(folder)
    try:
        config = read_vision_config(cfg)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None
    if not config.vectors:
        raise InputError(f"{folder}: found a SigLIP without its head; expected one with a vector")
    vector = vector or config.vectors[0]
    check_choice(f"{folder}: vector", vector, config.vectors)
    steps = read_recipe(folder, recipe)
    network = functional(build(config))
    params, digest = load_params(folder, network, vision_keymap(config))

    def apply(params: Params, x_BHWC: jax.Array) -> jax.Array:
        return getattr(network.apply(params, x_BHWC), vector)

    width = config.projection if vector == "projected" else config.width
    mark = combine(digest, config.kind, vector, str(steps))
    return FolderExtractor(name, config.kind, vector, steps, mark, width, compiled(apply), params)


def compiled(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Compile a network's function, with products in full precision."""

    @jax.jit
    def run(params: Params, x: Any) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return apply(params, x)

    return run


def combine(*parts: str) -> str:
    """Fingerprint of several, and of the version of this code."""
    text = "\0".join((str(VERSION), *parts))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """Content of the config.json of a folder that is safe to read. Raises: InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: found no such folder; expected one with a config.json")
    try:
        check_files_no_escape(folder, folder)
    except OSError as error:
        raise InputError(f"{folder}: found {error.strerror}; expected a folder to read") from None
    return read_json(folder / "config.json")


def load_params(folder: Path, network: Functional, keymap: KeyMap) -> tuple[Params, str]:
    """Parameters of a network, in float32, and the fingerprint of the tensors that it reads.

    Raises: InputError unless every tensor of the files is accounted for.
    """
    return params_of_weights(open_weights(folder, library="transformers"), network, keymap)


def params_of_weights(weights: Weights, network: Functional, keymap: KeyMap) -> tuple[Params, str]:
    """Parameters and fingerprint of opened weight files, as `load_params`."""
    where = str(weights.folder)
    tensor_map = check_keys(weights.shapes, network.abstract, keymap, where)
    check_dtypes(weights.dtypes, tensor_map, where)
    digests: list[str] = []
    stream = _digested(weights.stream(tensor_map), digests)
    params = place_tensors(stream, tensor_map, network.abstract, jnp.float32, where)
    return params, combine(*sorted(digests))


def _digested(
    stream: Iterable[tuple[str, np.ndarray]], digests: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Pass tensors on, and append the fingerprint of every one to `digests`."""
    for key, value in stream:
        digests.append(fingerprint([(key, value)]))
        yield key, value
