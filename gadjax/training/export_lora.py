"""Export of a run's adapters: a folder with the LoRA, its scheduler, settings and model card."""

import json
from pathlib import Path
from typing import Any

from gadjax.errors import InputError, check_choice
from gadjax.formats.diffusers_folder import PipelineFolder, check_pipeline
from gadjax.formats.lora_file import SAMPLING
from gadjax.formats.lora_writer import KEYS, LORA_LOADERS, pairs_of, write_diffusers, write_peft
from gadjax.formats.model_card import CARD, card, metadata_json
from gadjax.formats.orbax_folder import as_diffusers_folder
from gadjax.formats.sampling_config import GADJAX_JSON
from gadjax.io.atomic import atomic_folder, check_target
from gadjax.pipelines import parity
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
    source, folder = open_teacher(trained, out, teacher)
    part = folder.components[folder.backbone]
    trained.check_base(part)
    pairs = pairs_of(trained.adapters, part)
    scheduler, sampling = scheduler_and_sampling(trained, folder)
    loads = folder.model_index.get("_class_name") in LORA_LOADERS
    description = describe(out.resolve().name, trained, folder, scheduler, sampling, None)
    description = description.with_adapter("diffusers" if loads else "peft", scheduler)
    settings = trained.sampling.to_dict() | {"rollout": trained.sampling.rollout}
    texts = {SAMPLING: json.dumps(settings), "modelspec.usage_hint": _hint(trained, folder)}

    with atomic_folder(out, overwrite=overwrite, marker=GADJAX_JSON) as new:
        write_diffusers(new, folder.backbone, pairs, keys=keys, dtype=dtype, metadata=texts)
        if not loads:
            write_peft(new, pairs, dtype, texts)
        if scheduler is not None:
            (new / "scheduler").mkdir()
            text = json.dumps(scheduler, indent=2, sort_keys=True) + "\n"
            (new / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")
        (new / GADJAX_JSON).write_text(metadata_json(description, None), encoding="utf-8")
        verified = None
        if not parity.missing(lora=True):
            with as_diffusers_folder(source, out) as src:
                verified = parity.verify_lora(check_pipeline(src).path, new, description.pipeline)
        (new / GADJAX_JSON).write_text(metadata_json(description, verified), encoding="utf-8")
        (new / CARD).write_text(card(description, verified), encoding="utf-8")
    return verified


def _hint(trained: Trained, folder: PipelineFolder) -> str:
    """Sentence for user interfaces that show "modelspec.usage_hint"."""
    sampling = trained.sampling
    if sampling.timesteps is None:
        return f"{sampling.steps} steps, guidance {sampling.guidance:g}"
    times = ", ".join(f"{t:g}" for t in sampling.timesteps)
    return f"{sampling.steps} steps from timesteps {times}, without guidance (cfg 1)"
