"""Pipelines with LoRA files: read, checked and merged in float32."""

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import jax

from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import (
    INDEX,
    SCHEDULER,
    Component,
    PipelineFolder,
    check_pipeline,
)
from gadjax.formats.diffusers_writer import write_pipeline
from gadjax.formats.lora_file import LoraFile, add_factors, read_lora
from gadjax.formats.lora_names import layers_of
from gadjax.formats.orbax_folder import as_diffusers_folder, open_folder
from gadjax.formats.sampling_config import GADJAX_JSON, SamplingConfig, read_sampling
from gadjax.io.atomic import atomic_folder, check_no_overlap, check_target
from gadjax.io.untrusted import read_json
from gadjax.pipelines.known_students import published_loras, published_student
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline, make_pipeline
from gadjax.types import Params

Weighted = Sequence[tuple[Path, float]]  # files, and the weight of each


def merge_loras(
    folder: PipelineFolder,
    params: dict[str, Params],
    loras: Weighted,
    networks: Collection[str] | None = None,
) -> tuple[dict[str, Params], SamplingConfig | None]:
    """Parameters of a pipeline's networks with LoRA files merged, and their sampling settings.

    Args:
      folder: the pipeline.
      params: NumPy arrays by network; they are not changed.
      loras: files or folders with the weight of each.
      networks: names of those whose adapters are merged; None: all.

    Returns: parameters, and the settings in the files' headers, None without any.
    Raises: InputError as `read_lora`, and where two files have different settings.
    """
    settings: dict[SamplingConfig, LoraFile] = {}
    for path, weight in loras:
        lora = read_lora(path, folder)
        for name, factors in lora.factors.items():
            if networks is not None and name not in networks:
                continue
            layers = layers_of(folder.components[name])
            params = params | {name: add_factors(params[name], layers, factors, weight)}
        if lora.sampling:
            settings.setdefault(lora.sampling, lora)
    if len(settings) > 1:
        first, second = (lora.path for lora in list(settings.values())[:2])
        raise InputError(
            f"--lora: found {first} and {second}, which are sampled in other steps; expected one "
            "few-step student at most"
        )
    return params, next(iter(settings), None)


def write_merged(
    folder: Path,
    loras: Weighted,
    out: Path,
    *,
    dtype=None,
    overwrite: bool = False,
    preset: str | None = None,
) -> Path:
    """Write a diffusers folder atomically: a pipeline with LoRA files merged into its networks.

    The scheduler and the settings of a few-step student's LoRA come with it.

    Args:
      folder: the pipeline folder, of either format.
      loras: files or folders with the weight of each.
      out: folder to write.
      dtype: of the changed networks' files; None: that of the pipeline's.
      overwrite: replace an existing pipeline folder.
      preset: published student that the first LoRA is, or without any the folder; None: as the
        LoRAs' files are named.

    Returns: `out`.
    Raises: InputError as `merge_loras` and `published_student`.
    """
    check_target(out, overwrite=overwrite, marker=INDEX)
    check_no_overlap(out, folder, *(path for path, _ in loras))
    pipeline = open_folder(folder)
    loras, preset = published_loras(loras, preset)
    before = {name: part.params for name, part in pipeline.components.items()}
    after, sampling = merge_loras(pipeline, before, loras)
    changed = {
        name: after[name] if dtype else _with_dtypes(after[name], before[name])
        for name in before
        if after[name] is not before[name]
    }
    source = next((path for path, _ in loras if (path / SCHEDULER).is_file()), None)
    scheduler = source and read_json(source / SCHEDULER)
    if preset is not None:
        student, sampling = published_student(preset, make_pipeline(pipeline))
        scheduler = student.folder.scheduler
    with (
        atomic_folder(out, overwrite=overwrite, marker=INDEX) as new,
        as_diffusers_folder(folder, out) as src,
    ):
        write_pipeline(check_pipeline(src), new, changed, scheduler=scheduler, dtype=dtype)
        if source is not None and (source / GADJAX_JSON).is_file():
            entries = read_json(source / GADJAX_JSON) | {"verified": None}
            (new / GADJAX_JSON).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        elif sampling is not None:
            record_sampling(new / GADJAX_JSON, sampling, folder / GADJAX_JSON)
        elif (folder / GADJAX_JSON).is_file():
            shutil.copyfile(folder / GADJAX_JSON, new / GADJAX_JSON)
    return out


def record_sampling(path: Path, sampling: SamplingConfig, others: Path) -> None:
    """Write the settings of a LoRA's few-step student to gadjax.json.

    Args:
      path: file to write.
      sampling: the settings.
      others: file whose other entries are kept, if there is one.
    """
    entries = read_json(others) if others.is_file() else {}
    entries |= sampling.to_dict() | {"rollout": sampling.rollout}
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _with_dtypes(params: Params, like: Params) -> Params:
    return jax.tree.map(lambda new, old: new.astype(old.dtype), params, like)


def merge_into_folder(
    folder: PipelineFolder, loras: Weighted
) -> tuple[PipelineFolder, SamplingConfig | None]:
    """A pipeline folder with LoRA files merged into its backbone, in the dtypes that it has.

    Args:
      folder: the pipeline, with parameters; it is not changed.
      loras: files or folders with the weight of each.

    Returns: the folder, and the settings in the files' headers, None without any.
    Raises: InputError as `merge_loras`; for adapters of a text encoder, whose prompt embeddings
      would be others than those of the folder's fingerprint; and for a published few-step student.
    """
    _, preset = published_loras(loras)
    if preset is not None:
        raise InputError(
            f"--lora: found the LoRA of {preset}, which has its own scheduler; expected another "
            "(gadjax lora merge writes a folder with both)"
        )
    before = {name: part.params for name, part in folder.components.items()}
    after, sampling = merge_loras(folder, before, loras)
    changed = [name for name in before if after[name] is not before[name]]
    if others := [name for name in changed if name != folder.backbone]:
        raise InputError(
            f"--lora: found adapters of the {others[0]}; expected ones of the {folder.backbone} "
            "alone in a folder (gadjax sample --lora takes both)"
        )
    return _with_params(folder, after, changed), sampling


def merge_text_encoders(
    folder: PipelineFolder, loras: Weighted
) -> tuple[PipelineFolder, dict[str, Component]]:
    """A pipeline folder with LoRA files merged into its text encoders, in the dtypes that it has.

    Args:
      folder: the pipeline, with parameters of the text encoders; it is not changed.
      loras: files or folders with the weight of each.

    Returns: the folder, and the changed encoders by name.
    Raises: InputError as `read_lora`, and for files without adapters of a text encoder.
    """
    encoders = folder.text_encoders
    loras, _ = published_loras(loras)
    before = {name: folder.components[name].params for name in encoders}
    after, _ = merge_loras(folder, before, loras, encoders)
    changed = [name for name in encoders if after[name] is not before[name]]
    if loras and not changed:
        raise InputError(
            f"--lora: found no adapters of a text encoder in {loras[0][0]}; expected some, as the "
            "prompt embeddings are the same without"
        )
    folder = _with_params(folder, after, changed)
    return folder, {name: folder.components[name] for name in changed}


def _with_params(
    folder: PipelineFolder, params: dict[str, Params], names: Sequence[str]
) -> PipelineFolder:
    """The folder with other parameters of some networks, in the dtypes that it has."""
    parts = dict(folder.components)
    for name in names:
        values = _with_dtypes(params[name], parts[name].params)
        parts[name] = replace(parts[name], params=values)
    return replace(folder, components=parts)


def adapted_model(folder: Path, loras: Weighted) -> Model:
    """A pipeline folder with LoRA files merged, in float32.

    Args:
      folder: the pipeline folder.
      loras: files or folders with the weight of each.
    """
    pipeline, params = load_pipeline(folder)
    params, sampling = merge_loras(pipeline.folder, params, loras)
    sampling = sampling or read_sampling(folder, pipeline.sampling)
    return Model(folder.name, pipeline, params, sampling)
