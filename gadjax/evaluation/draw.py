"""Drawing many sets of pictures at once with a model that is evaluated."""

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

    Raises: InputError for pictures that are not finite.
    """
    prompts = [prompt for prompts, _ in sets.values() for prompt in prompts]
    images = draw(
        model.pipeline,
        model.params,
        model.sampling,
        prompts,
        np.concatenate([noise for _, noise in sets.values()]),
        batch=batch,
        progress=lambda done: bar.update(done * model.evaluations),
    )
    check_finite(model, images)
    ends = np.cumsum([len(prompts) for prompts, _ in sets.values()])
    return dict(zip(sets, np.split(images, ends[:-1]), strict=True))


def check_finite(model: Model, images: np.ndarray) -> None:
    """Raises: InputError for pictures that are not finite."""
    if not np.isfinite(images).all():
        raise InputError(f"{model.name}: found pictures that are not finite; expected finite ones")
