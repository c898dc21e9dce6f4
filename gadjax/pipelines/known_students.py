"""Sampling settings of published distilled checkpoints and LoRAs.

diffusers' scheduler configs do not store timesteps, guidance scale or the scale of the initial
latents, nor LoRA files the strength at which they are published: these are in the papers' code and
model cards. Students exported by gadjax store them in gadjax.json. The settings are the cards'; no
published weights were run with them.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gadjax.errors import InputError, check_choice
from gadjax.formats.pipeline_classes import FLUX, KLEIN, PIXART, SD, SD3, SDXL, SPRINT, Z_IMAGE
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.formats.scheduler_config import DDIM, DPM, LCM, TCD, schedule_from_config
from gadjax.pipelines.pipeline import Pipeline, with_scheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedStudent:
    """Sampling settings of one published student.

    Attributes:
      family: diffusers pipeline class.
      steps, timesteps, guidance: as in `SamplingConfig`.
      scheduler: class that replaces the folder's scheduler, with the same betas; None keeps it.
      length: prompt length in tokens; None: the pipeline's.
      start: time whose sigma scales the initial latents; None for standard normal latents.
      changes: values of the scheduler's config.
      eta: share of fresh noise in TCD's steps.
      strength: factor of the published LoRA.
      files: regex of the end of the LoRA's path, by which it is recognised; "" for none.
    """

    family: str
    steps: int
    timesteps: tuple[float, ...] | None = None
    guidance: float = 1.0
    scheduler: str | None = None
    length: int | None = None
    start: float | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    eta: float = 0.0
    strength: float = 1.0
    files: str = ""


def trailing(steps: int, total: int = 1000) -> tuple[float, ...]:
    """Timesteps of diffusers' "trailing" spacing."""
    return tuple((np.arange(total, 0, -total / steps).round() - 1).tolist())


def _ddim(family: str, steps: int, guidance: float, files: str) -> PublishedStudent:
    """Student of DDIM with trailing steps.

    Where the number of steps does not divide 1000, diffusers' DDIM steps to times beside the next
    step's; here they join.
    """
    if 1000 % steps:
        return PublishedStudent(family, steps, trailing(steps), guidance, files=files)
    # The configs of both releases have the second; DDIM's own default is true.
    changes = {"timestep_spacing": "trailing", "clip_sample": False}
    return PublishedStudent(
        family, steps, guidance=guidance, scheduler=DDIM, changes=changes, files=files
    )


def _loras() -> Iterator[tuple[str, PublishedStudent]]:
    """Published LoRAs of several steps and families."""
    for name, label, family in (("sd1.5", "SD15", SD), ("sdxl", "SDXL", SDXL)):
        version = {"sd1.5": "sdv1-5", "sdxl": "sdxl"}[name]
        # Luo et al., arXiv:2311.05556; cards of latent-consistency/lcm-lora-*.
        yield (
            f"lcm-{name}",
            PublishedStudent(family, 4, scheduler=LCM, files=rf"lcm-lora-{version}\b.*"),
        )
        # Ren et al., arXiv:2404.13686; the card of ByteDance/Hyper-SD. The LoRA of one step, which
        # takes more too, has TCD's steps.
        file = rf"Hyper-{label}-%s-lora\.safetensors"
        yield (
            f"hyper-{name}-1",
            PublishedStudent(family, 1, scheduler=TCD, eta=1.0, files=file % "1step"),
        )
        for steps in (2, 4, 8):
            yield f"hyper-{name}-{steps}", _ddim(family, steps, 1.0, file % f"{steps}steps")
        for steps in (8, 12):  # 5 to 8 by the card
            yield f"hyper-{name}-{steps}-cfg", _ddim(family, steps, 5.0, file % f"{steps}steps-CFG")
        # Wang et al., arXiv:2405.18407; the card of wangfuyun/PCM_Weights, which has TCD beside.
        file = rf"pcm_{label.lower()}_%s_{{0}}step_converted\.safetensors"
        for steps in (2, 4, 8, 16):
            pattern = (file % "smallcfg").format(steps)
            yield f"pcm-{name}-{steps}", _ddim(family, steps, 1.0, pattern)
        for steps in (4, 8, 16):
            pattern = (file % "normalcfg").format(steps)
            yield f"pcm-{name}-{steps}-cfg", _ddim(family, steps, 7.5, pattern)
        pattern = rf"pcm_{label.lower()}_lcmlike_lora_converted\.safetensors"
        yield f"pcm-{name}-lcmlike", PublishedStudent(family, 4, scheduler=LCM, files=pattern)
    for steps, guidance in ((4, 3.0), (8, 5.0), (16, 7.0)):
        file = rf"Hyper-SD3-{steps}steps-CFG-lora\.safetensors"
        student = PublishedStudent(SD3, steps, guidance=guidance, strength=0.125, files=file)
        yield f"hyper-sd3-{steps}-cfg", student
    # The same card: the folder's own grid, the base's embedded guidance.
    for steps in (8, 16):
        file = rf"Hyper-FLUX\.1-dev-{steps}steps-lora\.safetensors"
        student = PublishedStudent(FLUX, steps, guidance=3.5, strength=0.125, files=file)
        yield f"hyper-flux-{steps}", student
    # Lin et al., arXiv:2402.13929; the card of ByteDance/SDXL-Lightning: Euler with trailing steps,
    # whose first latents are the noise at time 999 alone. U-Nets and LoRAs have the same steps.
    for steps in (2, 4, 8):
        file = rf"sdxl_lightning_{steps}step_lora\.safetensors"
        times = trailing(steps)
        yield f"lightning-sdxl-{steps}", PublishedStudent(SDXL, steps, times, start=999, files=file)


PUBLISHED_STUDENTS = {
    # Luo et al., arXiv:2503.06674, and GAD's students of PixArt-alpha 512.
    "tdm-pixart": PublishedStudent(PIXART, 4, (899, 674, 449, 224)),
    # The card of Luo-Yihong/TDM_sd3_lora: a flow's DPM-Solver++ of order 2, with a shift of 6.
    "tdm-sd3": PublishedStudent(
        SD3,
        4,
        scheduler=DPM,
        changes={
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 6.0,
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "final_sigmas_type": "zero",
        },
        strength=0.125,
        files=r"TDM_sd3_lora\b.*",
    ),
    # DP-DMD: the repository's shifted grid.
    "dp-dmd-sd3.5": PublishedStudent(SD3, 4),
    # Sauer et al., arXiv:2403.12015; the card of stable-diffusion-3.5-large-turbo: guidance 0.
    "sd3.5-large-turbo": PublishedStudent(SD3, 4),
    # Yin et al., arXiv:2405.14867; the card of tianweiy/DMD2, for U-Net and LoRA.
    "dmd2-sdxl": PublishedStudent(
        SDXL,
        4,
        (999, 749, 499, 249),
        scheduler=LCM,
        files=r"dmd2_sdxl_4step_lora(_fp16)?\.safetensors",
    ),
    "dmd2-sdxl-one-step": PublishedStudent(SDXL, 1, (399,), scheduler=LCM),
    # Zhou et al., arXiv:2406.01561: x0 of sigma z at time 625.
    "sid-sd": PublishedStudent(SD, 1, (625,), scheduler=LCM, start=625),
    # Liu et al., arXiv:2511.22677 (decoupled DMD); the folder's own scheduler, shift 3.
    "z-image-turbo": PublishedStudent(Z_IMAGE, 8),
    # Sauer et al., arXiv:2403.12015; the card of FLUX.1-schnell: guidance 0, 256 tokens of T5.
    "flux-schnell": PublishedStudent(FLUX, 4, length=256),
    # The card of alimama-creative/FLUX.1-Turbo-Alpha: a LoRA of 8 steps of the folder's own grid.
    "flux-turbo-alpha": PublishedStudent(
        FLUX, 8, guidance=3.5, length=512, files=r"FLUX\.1-Turbo-Alpha\b.*"
    ),
    "flux2-klein": PublishedStudent(KLEIN, 4),  # the card of FLUX.2-klein-4B: guidance 1
    # Chen et al., arXiv:2503.09641.
    "sana-sprint": PublishedStudent(SPRINT, 2, guidance=4.5),
    # Whole U-Nets of one step, of the same cards as the LoRAs.
    "hyper-sdxl-one-step": PublishedStudent(SDXL, 1, (800,), scheduler=LCM),
    "lightning-sdxl-one-step": PublishedStudent(
        SDXL, 1, (999,), start=999, changes={"prediction_type": "sample"}
    ),
    **dict(_loras()),
}
# End of a LoRA's path -> why its student is not sampled here.
REFUSED = {
    r"swd[-_](medium|large|sdxl|flux)\b.*": "an SwD student, whose latents grow between its steps",
}


def recognised(path: Path) -> str | None:
    """Name of the published student whose LoRA is in a file, by its name or its folder's.

    Raises: InputError for a student that cannot be sampled.
    """
    names = ("/".join(path.absolute().parts[-count:]) for count in (1, 2))
    for name in names:
        for pattern, why in REFUSED.items():
            if re.fullmatch(rf"(.*/)?{pattern}", name, re.IGNORECASE):
                raise InputError(f"{path}: found {why}; expected one of the same size throughout")
        for student, settings in PUBLISHED_STUDENTS.items():
            pattern = settings.files
            if pattern and re.fullmatch(rf"(.*/)?{pattern}", name, re.IGNORECASE):
                return student
    return None


def published_loras(
    loras: Sequence[tuple[Path, float]], preset: str | None = None
) -> tuple[tuple[tuple[Path, float], ...], str | None]:
    """LoRA files with the strength at which they are published, and the student that they are.

    Args:
      loras: files with the weight of each, relative to that strength.
      preset: name of the published student, if it is given: of the first file.

    Raises: InputError for two students, and as `recognised`.
    """
    names = [recognised(path) for path, _ in loras]
    if preset is not None and names:
        names[0] = preset
    students = sorted({name for name in names if name})
    if len(students) > 1:
        raise InputError(
            f"--lora: found {' and '.join(students)}, which are sampled in other steps; expected "
            "one few-step student at most"
        )
    for (path, _), name in zip(loras, names, strict=True):
        if name and name != preset:
            log.warning("%s: taken for %s, sampled as its card says", path, name)
    strengths = [PUBLISHED_STUDENTS[name].strength if name else 1.0 for name in names]
    scaled = ((path, w * s) for (path, w), s in zip(loras, strengths, strict=True))
    return tuple(scaled), next(iter(students), preset)


def published_student(name: str, pipeline: Pipeline) -> tuple[Pipeline, SamplingConfig]:
    """Pipeline with the scheduler of a published student, and its sampling settings.

    Raises: InputError for an unknown name, or a pipeline of another family or release.
    """
    check_choice("student_preset", name, PUBLISHED_STUDENTS)
    student, folder = PUBLISHED_STUDENTS[name], pipeline.folder
    family = folder.model_index.get("_class_name")
    if family != student.family:
        raise InputError(f"{folder.path}: found a {family}; expected a {student.family} for {name}")
    embedded = pipeline.denoiser.guidance_embedded
    if family == FLUX and embedded != (student.guidance > 1):
        has = "with" if embedded else "without"
        raise InputError(
            f"{folder.path}: found a FLUX.1 {has} a scale as its input; expected the other one of "
            f"-dev and -schnell for {name}"
        )
    if student.scheduler is not None or student.changes:
        kind = student.scheduler or folder.scheduler["_class_name"]
        config = _scheduler(kind, folder.scheduler) | dict(student.changes)
        pipeline = with_scheduler(pipeline, config)
    sampling = replace(
        pipeline.sampling,
        steps=student.steps,
        timesteps=student.timesteps,
        guidance=student.guidance,
        length=student.length or pipeline.sampling.length,
        eta=student.eta,
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
