"""Export of a run's adapters: a folder with the LoRA, its scheduler, settings and model card."""

from pathlib import Path
from typing import Any

from gadjax.errors import InputError, check_choice
from gadjax.formats.lora_writer import KEYS, pairs_of
from gadjax.formats.sampling_config import GADJAX_JSON
from gadjax.io.atomic import check_target
from gadjax.pipelines.lora_folder import LoraExport, write_lora_folder
from gadjax.training.export import describe, open_teacher, scheduler_and_sampling
from gadjax.training.workdir import Trained


def export_lora(
    trained: Trained,
    out: Path,
    *,
    teacher: Path | None = None,
    keys: str = "diffusers",
    dtype=None,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Export the student's adapters of a run to the folder `out`, atomically.

    Pipelines of diffusers load it by `load_lora_weights`; for those without (PixArt) the folder has
    PEFT's files as well.

    Args:
      trained: trained weights of a run.
      out: folder to write.
      teacher: the teacher's folder now, if it has moved.
      keys: names of the modules, one of KEYS.
      dtype: of the tensors; None: float32.
      overwrite: replace an existing folder.

    Returns: result of the comparison with diffusers; None if it or PEFT is not installed.
    Raises: InputError for a run that trained whole weights, or inputs that do not belong together;
      RunStopped if diffusers samples other images with the LoRA.
    """
    check_choice("--keys", keys, KEYS)
    if trained.lora is None:
        raise InputError(
            f"{trained.workdir}: found a student whose whole weights were trained; expected one "
            "with student.lora.rank of 1 or more (without --lora it is exported as a pipeline)"
        )
    check_target(out, overwrite=overwrite, marker=GADJAX_JSON)
    _, folder = open_teacher(trained, out, teacher)
    part = folder.components[folder.backbone]
    trained.check_base(part)
    pairs = pairs_of(trained.adapters, part)
    scheduler, sampling = scheduler_and_sampling(trained, folder)
    description = describe(out.resolve().name, trained, folder, scheduler, sampling, None)
    lora = LoraExport(folder, pairs, scheduler, trained.sampling, description)
    return write_lora_folder(out, lora, keys=keys, dtype=dtype, overwrite=overwrite)
