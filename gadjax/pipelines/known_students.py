"""Sampling settings of published distilled checkpoints.

diffusers' scheduler configs do not store timesteps, guidance scale or the scale of the initial
latents: these are in the papers' code and model cards. Students exported by gadjax store them in
gadjax.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gadjax.errors import InputError, check_choice
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.formats.scheduler_config import LCM, schedule_from_config
from gadjax.pipelines.pipeline import Pipeline, with_scheduler


@dataclass(frozen=True)
class PublishedStudent:
    """Sampling settings of one published student.

    Attributes:
      family: diffusers pipeline class.
      steps, timesteps, guidance: as in `SamplingConfig`.
      scheduler: class that replaces the folder's scheduler, with the same betas; None keeps it.
      length: prompt length in tokens; None: the pipeline's.
      start: time whose sigma scales the initial latents; None for standard normal latents.
    """

    family: str
    steps: int
    timesteps: tuple[float, ...] | None = None
    guidance: float = 1.0
    scheduler: str | None = None
    length: int | None = None
    start: float | None = None


PUBLISHED_STUDENTS = {
    # Luo et al., arXiv:2503.06674, and GAD's students of PixArt-alpha 512.
    "tdm-pixart": PublishedStudent("PixArtAlphaPipeline", 4, (899, 674, 449, 224)),
    # DP-DMD: the repository's shifted grid.
    "dp-dmd-sd3.5": PublishedStudent("StableDiffusion3Pipeline", 4),
    # Sauer et al., arXiv:2403.12015; the card of stable-diffusion-3.5-large-turbo: guidance 0.
    "sd3.5-large-turbo": PublishedStudent("StableDiffusion3Pipeline", 4),
    # Yin et al., arXiv:2405.14867; the card of tianweiy/DMD2.
    "dmd2-sdxl": PublishedStudent(
        "StableDiffusionXLPipeline", 4, (999, 749, 499, 249), scheduler=LCM
    ),
    "dmd2-sdxl-one-step": PublishedStudent("StableDiffusionXLPipeline", 1, (399,), scheduler=LCM),
    # Zhou et al., arXiv:2406.01561: x0 of sigma z at time 625.
    "sid-sd": PublishedStudent("StableDiffusionPipeline", 1, (625,), scheduler=LCM, start=625),
    # Liu et al., arXiv:2511.22677 (decoupled DMD); the folder's own scheduler, shift 3.
    "z-image-turbo": PublishedStudent("ZImagePipeline", 8),
    # Sauer et al., arXiv:2403.12015; the card of FLUX.1-schnell: guidance 0, 256 tokens of T5.
    "flux-schnell": PublishedStudent("FluxPipeline", 4, length=256),
    # Chen et al., arXiv:2503.09641.
    "sana-sprint": PublishedStudent("SanaSprintPipeline", 2, guidance=4.5),
}


def published_student(name: str, pipeline: Pipeline) -> tuple[Pipeline, SamplingConfig]:
    """Pipeline with the scheduler of a published student, and its sampling settings.

    Raises: InputError for an unknown name, or a pipeline of another family.
    """
    check_choice("student_preset", name, PUBLISHED_STUDENTS)
    student, folder = PUBLISHED_STUDENTS[name], pipeline.folder
    family = folder.model_index.get("_class_name")
    if family != student.family:
        raise InputError(f"{folder.path}: found a {family}; expected a {student.family} for {name}")
    if student.scheduler is not None:
        pipeline = with_scheduler(pipeline, _scheduler(student.scheduler, folder.scheduler))
    sampling = replace(
        pipeline.sampling,
        steps=student.steps,
        timesteps=student.timesteps,
        guidance=student.guidance,
        length=student.length or pipeline.sampling.length,
    )
    if student.start is not None:
        _, sigma = schedule_from_config(folder.scheduler).alpha_sigma(student.start)
        sampling = replace(sampling, scale=float(sigma))
    return pipeline, sampling


def _scheduler(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Config of another scheduler class, as diffusers' from_config converts it.

    All keys are kept; those that the new class does not support are refused when it is read.
    """
    return {**config, "_class_name": name}
