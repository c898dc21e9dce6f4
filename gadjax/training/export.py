"""Export of a run's weights as a complete diffusers pipeline folder, checked against diffusers.

The check needs torch and diffusers; without them the folder is marked as not verified.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import INDEX, PipelineFolder, check_pipeline
from gadjax.formats.diffusers_writer import write_pipeline
from gadjax.formats.model_card import CARD, Export, card, metadata_json, read_license, read_report
from gadjax.formats.orbax_folder import as_diffusers_folder, open_folder
from gadjax.formats.sampling_config import GADJAX_JSON, SamplingConfig, read_world
from gadjax.formats.scheduler_config import DPM, PIXART, STOCHASTIC, student_scheduler_config
from gadjax.formats.schedulers import sampler_from_config
from gadjax.formats.weights import fingerprint, open_weights
from gadjax.io.atomic import atomic_folder, check_no_overlap, check_target, restore_replaced
from gadjax.io.untrusted import read_json
from gadjax.pipelines import parity
from gadjax.pipelines.diffusers_calls import call_arguments
from gadjax.training.workdir import Trained, shallow

# For a single step PixArtAlphaPipeline takes the second output of `scheduler.step`, and DPM-Solver
# has only one (diffusers issue 8689); PixArtSigmaPipeline, of the same parts, takes the first.
ONE_DPM_STEP = {PIXART: "PixArtSigmaPipeline"}


def export(
    trained: Trained,
    out: Path,
    *,
    teacher: Path | None = None,
    dtype=None,
    report: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Export trained weights to the folder `out`, atomically.

    Args:
      trained: trained weights of a run.
      out: folder to write.
      teacher: the teacher's folder now, if it has moved.
      dtype: of the weights' files; None: that of the parameters.
      report: report.json of `gadjax evaluate`, for the model card.
      overwrite: replace an existing folder.

    Returns: result of the comparison with diffusers; None if it is not installed.
    Raises: InputError for inputs that do not belong together, or timesteps that diffusers does not
      accept; RunStopped if diffusers samples other images.
    """
    measured = report and read_report(report)
    check_target(out, overwrite=overwrite, marker=INDEX)
    source, folder = open_teacher(trained, out, teacher)
    backbone = folder.backbone
    weights = trained.full_params(folder.components[backbone])
    scheduler, sampling = scheduler_and_sampling(trained, folder)
    description = describe(out.resolve().name, trained, folder, scheduler, sampling, measured)

    with atomic_folder(out, overwrite=overwrite, marker=INDEX) as new:
        with as_diffusers_folder(source, out) as src:
            pipeline = check_pipeline(src)
            parts = {backbone: shallow(pipeline.components[backbone], trained.layers)}
            pipeline = replace(pipeline, components=pipeline.components | parts)
            params = {backbone: weights}
            write_pipeline(pipeline, new, params, scheduler=scheduler, dtype=dtype)
        index = read_json(new / INDEX) | {"_class_name": description.pipeline}
        (new / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _check_report(report, measured, new / backbone)
        (new / GADJAX_JSON).write_text(metadata_json(description, None), encoding="utf-8")
        verified = None if parity.missing() else parity.verify(new)
        (new / GADJAX_JSON).write_text(metadata_json(description, verified), encoding="utf-8")
        (new / CARD).write_text(card(description, verified), encoding="utf-8")
    return verified


def open_teacher(trained: Trained, out: Path, teacher: Path | None) -> tuple[Path, PipelineFolder]:
    """The pipeline folder of a run, its teacher's or its student's start, with the backbone read.

    Args:
      trained: trained weights of the run.
      out: folder that will be written.
      teacher: the teacher's folder now, if it has moved.

    Raises: InputError for no such folder, or one that `out` would replace.
    """
    source = teacher or trained.base
    check_no_overlap(out, trained.workdir, source)
    restore_replaced(source)
    if not source.is_dir():
        raise InputError(
            f"{source}: found no such folder; expected the teacher of {trained.workdir} "
            "(--teacher gives its folder now)"
        )
    backbone = open_folder(source, components=()).backbone
    return source, open_folder(source, components=(backbone,))


def scheduler_and_sampling(
    trained: Trained, base: PipelineFolder
) -> tuple[dict[str, Any] | None, SamplingConfig]:
    """Scheduler config that replaces the folder's (None: keep it), and the sampling config.

    Args:
      trained: trained weights of a run.
      base: folder that they complete or adapt. A student that adds noise, and whose adapters are on
        one that did already, keeps its scheduler.

    Raises: InputError for timesteps that diffusers does not accept.
    """
    sampling = trained.sampling
    if not trained.is_few_step:
        return None, sampling
    adds_noise = base.scheduler["_class_name"] in STOCHASTIC
    if trained.on_start and adds_noise and sampling.rollout == "fresh_noise":
        scheduler = None
    else:
        scheduler = student_scheduler_config(
            base.scheduler, sampling.timesteps, base.pipeline, sampling.rollout
        )
    sampler = sampler_from_config(scheduler or base.scheduler, base.pipeline)
    sampler.times(timesteps=sampling.timesteps)
    return scheduler, sampling if sampler.takes_timesteps else replace(sampling, timesteps=None)


def describe(
    name: str,
    trained: Trained,
    teacher: PipelineFolder,
    scheduler: dict[str, Any] | None,
    sampling: SamplingConfig,
    report: dict[str, Any] | None,
) -> Export:
    """Facts of an export for its gadjax.json and model card.

    Args:
      name: of the exported folder.
      trained: trained weights of a run.
      teacher: the teacher's folder.
      scheduler: scheduler config that replaces the teacher's.
      sampling: sampling config of the export.
      report: report of `gadjax evaluate`.
    """
    spec, world = teacher.components[teacher.backbone].spec, trained.config["data"]["world"]
    bundled = world.startswith("gadjax.worlds.")
    pipeline = teacher.model_index.get("_class_name", "DiffusionPipeline")
    if scheduler and scheduler["_class_name"] == DPM and sampling.steps == 1:
        pipeline = ONE_DPM_STEP.get(pipeline, pipeline)
    return Export(
        name=name,
        sampling=sampling,
        times=trained.sampling.timesteps,
        step=trained.step,
        part=trained.part,
        config=trained.config,
        guidance=trained.teacher_guidance,
        teacher=_name(trained.config["teacher"]),
        fingerprint=trained.fingerprint,
        latent=(spec.sample_size, spec.sample_size, spec.latent_channels),
        pipeline=pipeline,
        arguments=call_arguments(teacher, pipeline, sampling),
        license=read_license(teacher.path),
        world=world.rpartition(".")[2] if bundled else read_world(teacher.path),
        report=report,
    )


def _name(teacher: str) -> str:
    """Last part of a teacher's path; the rest of the path is private."""
    return Path(teacher.removeprefix("asset:")).name


def _check_report(path: Path | None, report: dict[str, Any] | None, weights: Path) -> None:
    """Check a report's weights. Raises: InputError if it measured others than those exported."""
    measured = report and report.get("settings", {}).get(f"student's {weights.name}")
    if measured and measured != (exported := fingerprint(open_weights(weights))):
        raise InputError(
            f"{path}: found a report of weights with fingerprint {measured}; expected one of "
            f"those exported here, {exported}"
        )
