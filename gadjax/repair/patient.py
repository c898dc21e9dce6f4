"""Student under repair: its pipeline folder, and how it is sampled."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gadjax import assets
from gadjax.errors import InputError, check_choice
from gadjax.formats.diffusers_folder import INDEX
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.sampling_config import SamplingConfig, read_sampling, read_teacher_guidance
from gadjax.pipelines.adapted import write_merged
from gadjax.pipelines.known_students import PUBLISHED_STUDENTS
from gadjax.pipelines.pipeline import make_pipeline
from gadjax.pipelines.sampling import MAX_FEW_STEPS, few_step_settings
from gadjax.training.export import export
from gadjax.training.workdir import is_workdir, read_trained


@dataclass(frozen=True)
class Patient:
    """A distilled student as it is.

    Attributes:
      folder: its pipeline folder.
      sampling: its sampling settings.
      times: timesteps at which its steps start, noisiest first.
      rollout: "ode", or "fresh_noise" if its scheduler adds noise between steps.
      guidance: the teacher's guidance at which it was distilled, or that of the teacher's own
        sampling if the student's folder does not say.
      embedded: scale that is an input of its network; 1 where none is.
    """

    folder: Path
    sampling: SamplingConfig
    times: tuple[float, ...]
    rollout: str
    guidance: float
    embedded: float = 1.0


def open_patient(student: str, teacher: Path, made: Path, preset: str | None = None) -> Patient:
    """Open the student of a repair; one that is no pipeline folder is written as one, and so is a
    folder that is sampled as a published student.

    Args:
      student: a pipeline folder, a workdir of `gadjax train`, or a LoRA of the teacher.
      teacher: the teacher's pipeline folder.
      made: folder to write for a workdir, LoRA or preset; an earlier one is taken as it is.
      preset: published student that a folder or LoRA is.

    Raises: InputError for anything else, a student that is guided or has many steps.
    """
    path = assets.resolve(student)
    is_folder = path.is_dir() and (path / INDEX).exists()
    if preset is not None:
        check_choice("--student-preset", preset, PUBLISHED_STUDENTS)
        if is_workdir(path):
            raise InputError(
                f"--student-preset: found {preset} for {path}, a workdir; expected a folder or LoRA"
            )
    if is_folder and preset is None:
        folder = path
    elif made.exists():
        folder = made
    elif is_workdir(path):
        trained = read_trained(path)
        if trained.trained_steps:
            raise InputError(
                f"--student: found {student}, an expert of steps {trained.trained_steps}; expected "
                "a student of all its steps"
            )
        export(trained, made)
        folder = made
    elif is_folder:
        folder = write_merged(path, [], made, preset=preset)
    else:
        folder = _merge_lora(path, teacher, made, preset)
    pipeline = make_pipeline(open_folder(folder, components=()))
    sampling = read_sampling(folder, pipeline.sampling)
    if pipeline.guided(sampling.guidance):
        raise InputError(
            f"--student: found {student}, which is sampled at guidance {sampling.guidance:g}; "
            "expected a distilled student, without guidance (set it in its gadjax.json)"
        )
    settings = few_step_settings(pipeline, sampling)
    if settings is None:
        raise InputError(
            f"--student: found {student}, which is sampled in {sampling.steps} steps; expected a "
            f"distilled student of at most {MAX_FEW_STEPS} (set steps in its gadjax.json)"
        )
    starts, rollout = settings
    embedded = sampling.guidance if pipeline.denoiser.guidance_embedded else 1.0
    guidance = read_teacher_guidance(folder)
    guidance = _sampling_guidance(teacher) if guidance is None else guidance
    return Patient(folder, sampling, starts, rollout, float(guidance), embedded)


def _sampling_guidance(teacher: Path) -> float:
    """Guidance with which a teacher's folder is sampled."""
    pipeline = make_pipeline(open_folder(teacher, components=()))
    return read_sampling(teacher, pipeline.sampling).guidance


def _merge_lora(path: Path, teacher: Path, made: Path, preset: str | None) -> Path:
    """Pipeline folder of the teacher with a LoRA merged, and the LoRA's sampling settings."""
    if not path.exists():
        raise InputError(
            f"--student: found no {path}; expected a pipeline folder, a workdir or a LoRA"
        )
    return write_merged(teacher, [(path, 1.0)], made, dtype=np.float32, preset=preset)
