"""Sample many sets of pictures with one compiled program."""

from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from gadjax.errors import InputError
from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import draw


def draw_sets(
    model: Model, sets: Mapping[str, tuple[Sequence[str], np.ndarray]], batch: int, bar: tqdm
) -> dict[str, np.ndarray]:
    """Pictures [N, H, W, 3] of every set of N prompts and noises; the program is compiled once.

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
    return dict(zip(sets, np.split(images, ends[:-1]), strict=True))


def check_finite(model: Model, images: np.ndarray) -> None:
    """Check that all pictures are finite. Raises: InputError."""
    if not np.isfinite(images).all():
        raise InputError(f"{model.name}: found pictures that are not finite; expected finite ones")
