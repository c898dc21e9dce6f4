"""Feature extractor: a small convolutional network for perceptual distances, and its folder.

No public feature network covers the bundled world, so one is shipped. It is trained by
gadjax/experiments/shapes_features.py.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gadjax.errors import InputError, check_choice, short_repr
from gadjax.features.network import FolderExtractor, combine, compiled
from gadjax.features.preprocessing import Recipe
from gadjax.formats.safetensors_file import read_header, write_safetensors
from gadjax.formats.state_dict import params_from_tensors, tensors_from_params
from gadjax.formats.weights import fingerprint
from gadjax.io.untrusted import is_count, read_json
from gadjax.models.keymap import KeyMap
from gadjax.models.module import Functional, Keys, functional
from gadjax.types import Params

KEYMAP = KeyMap()
MAX_SIZE = 4096  # of a side or a width
_BATCH = 256


@dataclass(frozen=True)
class Config:
    """Sizes of a FeatureNet.

    size: side of the pictures, in pixels.
    widths: channels of the convolutions, each of which halves the side.
    hidden: width of the layer between the convolutions and the features.
    features: number D of features.
    """

    size: int = 32
    widths: tuple[int, ...] = (24, 32, 40)
    hidden: int = 64
    features: int = 32


class FeatureNet(nnx.Module):
    """Convolutional network: pictures [N, size, size, 3] in [-1, 1] -> features [N, D]."""

    def __init__(self, config: Config, rngs: Keys):
        inputs = (3, *config.widths)
        self.depth = len(config.widths)
        for i in range(self.depth):
            conv = nnx.Conv(inputs[i], inputs[i + 1], (3, 3), strides=2, rngs=rngs)
            setattr(self, f"conv_{i}", conv)
        flat = (config.size >> self.depth) ** 2 * config.widths[-1]
        self.linear_1 = nnx.Linear(flat, config.hidden, rngs=rngs)
        self.linear_2 = nnx.Linear(config.hidden, config.features, rngs=rngs)

    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        h = image_BHWC
        for i in range(self.depth):
            h = jax.nn.gelu(getattr(self, f"conv_{i}")(h))
        # Not pooled: the features have to depend on positions.
        return self.linear_2(jax.nn.gelu(self.linear_1(h.reshape(len(h), -1))))


def network(config: Config) -> Functional:
    """FeatureNet as pure functions."""
    return functional(lambda rngs: FeatureNet(config, rngs))


def save_features(folder: Path, config: Config, params: Params) -> None:
    """Write config.json and model.safetensors.

    Args:
      folder: made where it is missing.
      config: sizes of the network.
      params: its parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(
        folder / "model.safetensors", dict(tensors_from_params(jax.device_get(params), KEYMAP))
    )
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")


def load_features(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Load a feature extractor: pictures [N, size, size, 3] -> features [N, D].

    Raises: InputError for a folder that `save_features` has not written; the extractor raises it
      for pictures of another size.
    """
    config, net, params = _read(folder)
    params = jax.device_put(params)
    apply = jax.jit(net.apply)

    def extract(images_NHWC: np.ndarray) -> np.ndarray:
        if images_NHWC.shape[1:] != (config.size, config.size, 3):
            raise InputError(
                f"images: found shape {images_NHWC.shape}; expected (N, {config.size}, "
                f"{config.size}, 3)"
            )
        parts = []
        for start in range(0, len(images_NHWC), _BATCH):
            part = images_NHWC[start : start + _BATCH]
            padding = [(0, _BATCH - len(part))] + [(0, 0)] * 3
            padded = jnp.asarray(np.pad(part, padding), jnp.float32)
            parts.append(np.asarray(apply(params, padded))[: len(part)])
        return np.concatenate(parts)

    return extract


def is_shapes(folder: Path) -> bool:
    """True for a folder that `save_features` has written, by its config.json."""
    path = folder / "config.json"
    return path.is_file() and "widths" in read_json(path)


def load_shapes(
    name: str, folder: Path, vector: str | None = None, recipe: str | None = None
) -> FolderExtractor:
    """Load the network as an extractor like others, of uint8 pictures of any size.

    Args:
      name: for reports and messages.
      folder: written by `save_features`.
      vector: "features", the only one.
      recipe: None, as the network has no other.

    Raises: InputError for another folder, vector or recipe.
    """
    check_choice(f"{folder}: vector", vector or "features", ("features",))
    if recipe is not None:
        raise InputError(f"{folder}: found the recipe {recipe!r}; expected none")
    config, net, params = _read(folder)
    half = (127.5,) * 3  # to [-1, 1]
    steps = Recipe("bundled", size=(config.size, config.size), scale=1.0, mean=half, std=half)
    mark = combine(fingerprint(tensors_from_params(params, KEYMAP)), "shapes", str(steps))
    apply = compiled(net.apply)
    return FolderExtractor(name, "shapes", "features", steps, mark, config.features, apply, params)


def _read(folder: Path) -> tuple[Config, Functional, Params]:
    cfg = read_json(folder / "config.json")
    try:
        config = Config(**{**cfg, "widths": tuple(cfg["widths"])})
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: found {error}; expected {Config()}") from None
    sizes = (*config.widths, config.size, config.hidden, config.features)
    counts = all(is_count(size, 1, MAX_SIZE) for size in sizes)
    if not counts or config.size % 2 ** len(config.widths):  # each convolution halves it
        raise InputError(f"{folder / 'config.json'}: found {short_repr(cfg)}; expected {Config()}")
    net = network(config)
    path = folder / "model.safetensors"
    tensors = {key: tensor.read() for key, tensor in read_header(path).items()}
    return config, net, params_from_tensors(tensors, net.abstract, KEYMAP, str(path))
