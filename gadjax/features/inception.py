"""Inception-v3 for FID and KID, from a safetensors file in pytorch-fid's layout.

Two resizings, whose distances differ: pytorch-fid's (in the network, bilinear, no antialias) and
clean-fid's (Pillow, bicubic, in floats; Parmar et al. 2022).
"""

from pathlib import Path

import jax

from gadjax.errors import InputError, check_choice
from gadjax.features.network import (
    FolderExtractor,
    combine,
    compiled,
    params_of_weights,
)
from gadjax.features.preprocessing import Recipe
from gadjax.formats.safetensors_file import read_header
from gadjax.formats.weights import Weights
from gadjax.models.module import functional
from gadjax.models.vision.inception import FEATURES, KEYMAP, SIDE, Inception, fid_resize
from gadjax.types import Params

PICKLES = (".pth", ".pt", ".pkl", ".ckpt")
RECIPES = {
    "pytorch-fid": Recipe("pytorch-fid: 299 x 299, bilinear, no antialias", 0, None, 2, None),
    "clean-fid": Recipe(
        "clean-fid, in floats",
        size=(SIDE, SIDE),
        scale=1.0,
        mean=(128.0,) * 3,
        std=(128.0,) * 3,
        float_first=True,
    ),
}


def is_inception(path: Path) -> bool:
    """True for a weight file, which only Inception is given as; other networks are folders."""
    return path.is_file() or path.suffix in PICKLES


def load_inception(
    name: str, path: Path, vector: str | None = None, recipe: str | None = None
) -> FolderExtractor:
    """Load Inception-v3 with FID's weights.

    Args:
      name: for reports and messages.
      path: safetensors file with the tensors of pt_inception-2015-12-05.
      vector: "pool3", the only one.
      recipe: pytorch-fid (the default) or clean-fid.

    Raises: InputError for a pickle, for other tensors, and for an unknown vector or recipe.
    """
    if path.suffix in PICKLES:
        raise InputError(
            f"{path}: found a pickle, which can run code when it is opened; expected safetensors "
            "(load it with torch.load(weights_only=True), and save it with safetensors.torch)"
        )
    check_choice(f"--features {name}: vector", vector or "pool3", ("pool3",))
    recipe = recipe or "pytorch-fid"
    check_choice(f"--features {name}: recipe", recipe, RECIPES)
    network = functional(Inception)
    entries = read_header(path)
    counters = {key for key in entries if key.endswith(".num_batches_tracked")}
    entries = {key: entry for key, entry in entries.items() if key not in counters}
    params, digest = params_of_weights(Weights(path, None, (path,), entries), network, KEYMAP)

    def apply(params: Params, x_BHWC: jax.Array) -> jax.Array:
        if recipe == "pytorch-fid":
            x_BHWC = 2 * fid_resize(x_BHWC) - 1
        return network.apply(params, x_BHWC)

    steps = RECIPES[recipe]
    mark = combine(digest, "inception", "pool3", recipe)
    return FolderExtractor(
        name, "inception", "pool3", steps, mark, FEATURES, compiled(apply), params
    )
