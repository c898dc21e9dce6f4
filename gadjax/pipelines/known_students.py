"""How distilled weights of other people are sampled, whose folders do not say it themselves.

No scheduler of diffusers keeps timesteps, a guidance scale or the scale of the first latents: they
stand in the papers' code and model cards. Where gadjax exports a student, its gadjax.json says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gadjax.errors import InputError
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.formats.scheduler_config import LCM, schedule_from_config
from gadjax.pipelines.pipeline import Pipeline, with_scheduler


@dataclass(frozen=True)
class PublishedStudent:
    """family: the pipeline's class in diffusers. scheduler: the one that replaces the folder's own
    and keeps its betas; None keeps all. start: the time whose sigma scales the first latents."""

    family: str
    steps: int
    timesteps: tuple[float, ...] | None = None
    guidance: float = 1.0
    scheduler: str | None = None
    start: float | None = None


PUBLISHED_STUDENTS = {
    # Luo et al., arXiv:2503.06674, and GAD's own of PixArt-alpha 512.
    "tdm-pixart": PublishedStudent("PixArtAlphaPipeline", 4, (899, 674, 449, 224)),
    # DP-DMD: the repository's own shifted grid.
    "dp-dmd-sd3.5": PublishedStudent("StableDiffusion3Pipeline", 4),
    # Yin et al., arXiv:2405.14867; the card of tianweiy/DMD2.
    "dmd2-sdxl": PublishedStudent(
        "StableDiffusionXLPipeline", 4, (999, 749, 499, 249), scheduler=LCM
    ),
    "dmd2-sdxl-one-step": PublishedStudent("StableDiffusionXLPipeline", 1, (399,), scheduler=LCM),
    # Zhou et al., arXiv:2406.01561: x0 of sigma z at time 625.
    "sid-sd": PublishedStudent("StableDiffusionPipeline", 1, (625,), scheduler=LCM, start=625),
    # Chen et al., arXiv:2503.09641.
    "sana-sprint": PublishedStudent("SanaSprintPipeline", 2, guidance=4.5),
}


def published_student(name: str, pipeline: Pipeline) -> tuple[Pipeline, SamplingConfig]:
    """The pipeline under the scheduler of a known student, and how it is sampled.

    Raises: InputError for another name, or a pipeline of another family.
    """
    if name not in PUBLISHED_STUDENTS:
        raise InputError(f"recipe: found {name!r}; expected one of {', '.join(PUBLISHED_STUDENTS)}")
    known, folder = PUBLISHED_STUDENTS[name], pipeline.folder
    found = folder.model_index.get("_class_name")
    if found != known.family:
        raise InputError(f"{folder.path}: found a {found}; expected a {known.family} for {name}")
    if known.scheduler is not None:
        pipeline = with_scheduler(pipeline, _scheduler(known.scheduler, folder.scheduler))
    sampling = replace(
        pipeline.sampling, steps=known.steps, timesteps=known.timesteps, guidance=known.guidance
    )
    if known.start is not None:
        _, sigma = schedule_from_config(folder.scheduler).alpha_sigma(known.start)
        sampling = replace(sampling, scale=float(sigma))
    return pipeline, sampling


def _scheduler(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What diffusers' from_config makes of another scheduler's, which keeps keys that only the new
    class has: those that it does not follow are refused when they are read."""
    return {**config, "_class_name": name}
