"""Sample many sets of pictures with one compiled program, and read them part by part."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from gadjax.errors import InputError
from gadjax.io.image_grid import from_uint8, to_uint8
from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import draw

PART = 256  # pictures that are held as floats at a time


def draw_sets(
    model: Model, sets: Mapping[str, tuple[Sequence[str], np.ndarray]], batch: int, bar: tqdm
) -> dict[str, np.ndarray]:
    """Pictures, uint8 [N, H, W, 3], of every set of N prompts and noises; the program is compiled
    once.

    Args:
      model: pipeline, parameters and sampling settings.
      sets: prompts and noises [N, H, W, C] by name.
      batch: pictures at a time.
      bar: progress in network evaluations.
    Raises: InputError for pictures that are not finite.
    """
    prompts = [prompt for prompts, _ in sets.values() for prompt in prompts]
    images = draw(
        model,
        prompts,
        np.concatenate([noise for _, noise in sets.values()]),
        batch=batch,
        progress=lambda done: bar.update(done * model.evaluations),
    )
    check_finite(model, images)
    ends = np.cumsum([len(prompts) for prompts, _ in sets.values()])
    return dict(zip(sets, np.split(to_uint8(images), ends[:-1]), strict=True))


def map_pictures(f: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """Map a function of pictures [N, H, W, 3] in [-1, 1] over uint8 pictures, PART at a time.

    Args:
      f: returns an array with N rows.
      images: pictures [..., H, W, 3].
    Returns: [..., *f's further axes].
    """
    flat = images.reshape(-1, *images.shape[-3:])
    parts = [f(from_uint8(flat[i : i + PART])) for i in range(0, len(flat), PART)]
    out = np.concatenate(parts)
    return out.reshape(*images.shape[:-3], *out.shape[1:])


def check_finite(model: Model, images: np.ndarray) -> None:
    """Check that all pictures are finite. Raises: InputError."""
    if not np.isfinite(images).all():
        raise InputError(f"{model.name}: found pictures that are not finite; expected finite ones")
