"""Pipelines with LoRA files: read, checked and merged in float32."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import PipelineFolder
from gadjax.formats.lora_file import LoraFile, add_factors, read_lora
from gadjax.formats.lora_names import layers_of
from gadjax.formats.sampling_config import SamplingConfig, read_sampling
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.types import Params

Weighted = Sequence[tuple[Path, float]]  # files, and the weight of each


def merge_loras(
    folder: PipelineFolder, params: dict[str, Params], loras: Weighted
) -> tuple[dict[str, Params], SamplingConfig | None]:
    """Parameters of a pipeline's networks with LoRA files merged, and their sampling settings.

    Args:
      folder: the pipeline.
      params: NumPy arrays by network; they are not changed.
      loras: files or folders with the weight of each.

    Returns: parameters, and the settings in the files' headers, None without any.
    Raises: InputError as `read_lora`, and where two files have different settings.
    """
    settings: dict[SamplingConfig, LoraFile] = {}
    for path, weight in loras:
        lora = read_lora(path, folder)
        for name, factors in lora.factors.items():
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


def merge_into_folder(
    folder: PipelineFolder, loras: Weighted
) -> tuple[PipelineFolder, SamplingConfig | None]:
    """A pipeline folder with LoRA files merged into its backbone, in the dtypes that it has.

    Args:
      folder: the pipeline, with parameters; it is not changed.
      loras: files or folders with the weight of each.

    Returns: the folder, and the settings in the files' headers, None without any.
    Raises: InputError as `merge_loras`, and for adapters of a text encoder, whose prompt embeddings
      would be others than those of the folder's fingerprint.
    """
    before = {name: part.params for name, part in folder.components.items()}
    after, sampling = merge_loras(folder, before, loras)
    changed = [name for name in before if after[name] is not before[name]]
    if others := [name for name in changed if name != folder.backbone]:
        raise InputError(
            f"--lora: found adapters of the {others[0]}; expected ones of the {folder.backbone} "
            "alone in a folder (gadjax sample --lora takes both)"
        )
    parts = dict(folder.components)
    for name in changed:
        params = jax.tree.map(lambda new, old: new.astype(old.dtype), after[name], before[name])
        parts[name] = replace(parts[name], params=params)
    return replace(folder, components=parts), sampling


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
