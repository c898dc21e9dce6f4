"""Export of a run's weights as single files, with a workflow of ComfyUI beside them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from gadjax.errors import InputError
from gadjax.formats.comfyui import WORKFLOW, workflow, workflow_json
from gadjax.formats.diffusers_folder import PipelineFolder, check_pipeline
from gadjax.formats.lora_writer import write_scheduler
from gadjax.formats.model_card import CARD, FILE, card, metadata_json
from gadjax.formats.orbax_folder import as_diffusers_folder, open_folder
from gadjax.formats.sampling_config import GADJAX_JSON
from gadjax.formats.single_file import (
    checkpoint_tensors,
    has_original_names,
    modelspec,
    network_tensors,
    write_single_file,
)
from gadjax.io.atomic import atomic_folder, check_target
from gadjax.pipelines import parity
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.training.export import describe, open_teacher, scheduler_and_sampling
from gadjax.training.workdir import Trained


def export_single(
    trained: Trained,
    out: Path,
    *,
    teacher: Path | None = None,
    dtype=None,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Export the student's backbone as one file in diffusers' names, atomically, and of SD1.5, SDXL
    and SD3 the pipeline as one in the original names.

    Args:
      trained: trained weights of a run.
      out: folder to write.
      teacher: the teacher's folder now, if it has moved.
      dtype: of the tensors; None: that of the parameters.
      overwrite: replace an existing folder.

    Returns: result of the first file's comparison with diffusers; None if it is not installed.
    Raises: InputError for a student of fewer layers, or inputs that do not belong together;
      RunStopped if diffusers samples other images with the file.
    """
    if trained.layers:
        raise InputError(
            f"--single-file: found a student of {len(trained.layers)} layers in {trained.workdir}; "
            "expected all of the teacher's, as a file does not tell its configuration (without the "
            "flag it is exported as a pipeline)"
        )
    check_target(out, overwrite=overwrite, marker=GADJAX_JSON)
    source, folder = open_teacher(trained, out, teacher)
    name, backbone = out.resolve().name, folder.backbone
    scheduler, sampling = scheduler_and_sampling(trained, folder)
    description = describe(name, trained, folder, scheduler, sampling, None)
    description = description.with_adapter(FILE, scheduler)
    student = _with_params(folder, trained.full_params(folder.components[backbone]))
    texts = modelspec(folder, name, trained.sampling, description.license)

    with atomic_folder(out, overwrite=overwrite, marker=GADJAX_JSON) as new:
        file = new / f"{name}.safetensors"
        write_single_file(file, network_tensors(student.components[backbone]), texts, dtype)
        checkpoint = ""
        if has_original_names(folder):
            checkpoint = f"{name}-checkpoint.safetensors"
            complete = _with_params(open_folder(source), student.components[backbone].params)
            write_single_file(new / checkpoint, checkpoint_tensors(complete), texts, dtype)
        write_scheduler(new, scheduler)
        files = {"checkpoint": checkpoint, "diffusion_model": file.name}
        if nodes := workflow(folder, trained.sampling, **files):
            (new / WORKFLOW).write_text(workflow_json(nodes), encoding="utf-8")
        (new / GADJAX_JSON).write_text(metadata_json(description, None), encoding="utf-8")
        verified = None
        if not parity.missing():
            with as_diffusers_folder(source, out) as src:
                pipeline, params = load_pipeline(check_pipeline(src).path)
                params |= {backbone: student.components[backbone].params}
                model = Model(name, pipeline, params, trained.sampling)
                verified = parity.verify_backbone(src, file, description.pipeline, model)
        (new / GADJAX_JSON).write_text(metadata_json(description, verified), encoding="utf-8")
        (new / CARD).write_text(card(description, verified), encoding="utf-8")
    return verified


def _with_params(folder: PipelineFolder, params) -> PipelineFolder:
    """The folder with other parameters of its backbone."""
    part = replace(folder.components[folder.backbone], params=params)
    return replace(folder, components=folder.components | {folder.backbone: part})
