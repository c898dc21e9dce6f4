"""Scorers of a picture for its prompt: CLIPScore, PickScore, SigLIP, LAION's aesthetic head.

A score is of an extractor's features, which are those of `--features` of the same folder.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gadjax.errors import InputError
from gadjax.features.network import FolderExtractor, load_extractor
from gadjax.features.texts import load_text_encoder
from gadjax.formats.safetensors_file import read_header
from gadjax.formats.weights import open_weights

HEAD = "aesthetic.safetensors"  # sac+logos+ava1-l14-linearMSE.pth, converted
HEAD_LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
HEAD_WIDTHS = (768, 1024, 128, 64, 16, 1)
MEANINGS = {
    "clipscore": "cosine of the picture's and the prompt's vectors, without a factor or a floor",
    "pickscore": "exp(logit_scale) times the cosine (Kirstain et al. 2023)",
    "siglip": "cosine of SigLIP's vectors of the picture and the prompt, without scale and bias",
    "aesthetic": "LAION's aesthetic predictor v2; it rises with saturation",
}
VECTORS = {"CLIPModel": ("clip", "projected"), "SiglipModel": ("siglip", "pooled")}
OUTSIDE = "score a folder of `gadjax sample --layout` with its own script, and pass --import"
# Scores whose files are pickles or whose networks are not ported, with the reason.
REFUSED = {
    "hpsv2": "its weights (HPS_v2.1_compressed.pt) are a pickle in OpenCLIP's layout",
    "hpsv3": "it is a vision-language model of 7 B parameters",
    "imagereward": "its weights (ImageReward.pt) are a pickle of BLIP",
}


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scorer: `scorer(features_ND, prompts) -> scores [N]`, higher is better.

    Attributes:
      name: the user's, which begins with the kind.
      kind: a key of MEANINGS.
      extractor: of the pictures' features.
      scale: factor of the cosine.
      encode: prompts -> [N, D]; None for a score of the picture alone.
      head: (weights [D], bias) of a score of the picture alone.
      truncated: prompts that were longer than the text tower takes; filled by calls.
    """

    name: str
    kind: str
    extractor: FolderExtractor
    scale: float = 1.0
    encode: Callable[[Sequence[str]], np.ndarray] | None = None
    head: tuple[np.ndarray, float] | None = None
    truncated: set[str] = field(default_factory=set)
    _texts: dict[str, np.ndarray] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind}, {MEANINGS[self.kind]}; {self.extractor}"

    def __call__(self, features_ND: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        x = np.asarray(features_ND, np.float64)
        x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        if self.head is not None:
            weights, bias = self.head
            return x @ weights + bias
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            self._texts.update(zip(new, self.encode(new), strict=True))
        y = np.stack([self._texts[prompt] for prompt in prompts]).astype(np.float64)
        y = y / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
        return self.scale * (x * y).sum(-1)


def load_scorer(name: str, folder: Path, recipe: str | None = None) -> Scorer:
    """Load a scorer from the folder of a CLIPModel or a SiglipModel, with its tokenizer.

    Args:
      name: clipscore, pickscore, siglip or aesthetic, and more behind a hyphen (clipscore-h14). The
        last takes the head's file in the folder too, as aesthetic.safetensors.
      folder: config.json, model.safetensors, preprocessor_config.json and the tokenizer's files.
      recipe: named preprocessing in place of the folder's.

    Raises: InputError for another name, or for files that are missing or unsupported.
    """
    kind, folder = name.split("-")[0], Path(folder)
    if kind in REFUSED:
        raise InputError(f"--scores {name}: {REFUSED[kind]}; {OUTSIDE}")
    if kind not in MEANINGS:
        raise InputError(
            f"--scores: found {name!r}; expected {', '.join(MEANINGS)}, and more behind a hyphen"
        )
    extractor = load_extractor(name, folder, recipe=recipe)
    expected = "SiglipModel" if kind == "siglip" else "CLIPModel"
    if (extractor.kind, extractor.vector) != VECTORS[expected]:
        raise InputError(f"{folder}: found a {extractor.kind}; expected the folder of a {expected}")
    if kind == "aesthetic":
        return Scorer(name, kind, extractor, head=_read_head(folder / HEAD, extractor.width))
    scale = 1.0
    if kind == "pickscore":
        scale = _logit_scale(folder)
    truncated: set[str] = set()
    encode = load_text_encoder(folder, truncated)
    return Scorer(name, kind, extractor, scale, encode, None, truncated)


def _logit_scale(folder: Path) -> float:
    weights = open_weights(folder, library="transformers")
    entry = weights.entries.get("logit_scale")
    if entry is None or math.prod(entry.shape) != 1:
        raise InputError(f"{folder}: found no logit_scale; expected the folder of a CLIPModel")
    value = float(entry.read().reshape(()))
    if not abs(value) < 20:
        raise InputError(f"{folder}: found a logit_scale of {value}; expected about 4.6")
    return math.exp(value)


def _read_head(path: Path, width: int) -> tuple[np.ndarray, float]:
    """Aesthetic head as one affine map: its layers have no activations between them."""
    if not path.is_file():
        raise InputError(
            f"{path}: found no such file; expected the head's tensors as safetensors (load "
            "sac+logos+ava1-l14-linearMSE.pth with torch.load(weights_only=True), and save it)"
        )
    entries = read_header(path)
    sizes = list(zip(HEAD_WIDTHS, HEAD_WIDTHS[1:], strict=False))
    expected = {}
    for name, (inputs, outputs) in zip(HEAD_LAYERS, sizes, strict=True):
        expected |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    shapes = {key: entry.shape for key, entry in entries.items()}
    if shapes != expected or width != HEAD_WIDTHS[0]:
        raise InputError(
            f"{path}: found tensors {shapes} for {width} features; expected those of LAION's head "
            f"for CLIP L/14: {expected}"
        )
    weights, bias = np.eye(width), np.zeros(width)
    for name in HEAD_LAYERS:
        layer = entries[f"{name}.weight"].read().astype(np.float64)
        weights, bias = layer @ weights, layer @ bias + entries[f"{name}.bias"].read()
    if not np.isfinite(weights).all() or not np.isfinite(bias).all():
        raise InputError(f"{path}: found numbers that are not finite; expected finite ones")
    return weights[0], float(bias[0])
