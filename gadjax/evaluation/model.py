"""A model that is evaluated, and drawing many sets of pictures with it at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from gadjax.convert.recipe import Sampling
from gadjax.errors import InputError
from gadjax.pipeline import Pipeline
from gadjax.sampling import draw
from gadjax.types import Params


@dataclass(frozen=True)
class Model:
    """A pipeline and how it is sampled. name: for messages."""

    name: str
    pipeline: Pipeline
    params: dict[str, Params]
    sampling: Sampling

    @property
    def evaluations(self) -> int:
        """Of the network, for one picture."""
        steps = self.sampling.steps
        if self.sampling.timesteps is None:
            steps += self.pipeline.sampler.extra if steps > 1 else 0
        return steps * (2 if self.guided else 1)

    @property
    def guided(self) -> bool:
        """Whether pictures are drawn with classifier-free guidance."""
        denoiser = self.pipeline.denoiser
        return not denoiser.embedded and denoiser.scale_of(self.sampling.guidance) != 1


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
