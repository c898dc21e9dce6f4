"""Folder of a LoRA: its files, scheduler, settings and model card, checked against diffusers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gadjax.formats.comfyui import COMFYUI, WORKFLOW, workflow, workflow_json
from gadjax.formats.diffusers_folder import PipelineFolder, check_pipeline
from gadjax.formats.lora_header import DIFFUSERS_WEIGHTS
from gadjax.formats.lora_writer import Pair, has_loader, header_texts, write_lora
from gadjax.formats.model_card import CARD, Export, card, metadata_json
from gadjax.formats.orbax_folder import as_diffusers_folder
from gadjax.formats.sampling_config import GADJAX_JSON, SamplingConfig
from gadjax.formats.single_file import modelspec
from gadjax.io.atomic import atomic_folder
from gadjax.pipelines import parity


class LoraExport(NamedTuple):
    """A LoRA to be written.

    Attributes:
      folder: the pipeline that it adapts.
      pairs: factors by module of the backbone.
      scheduler: scheduler config; None where it is the pipeline's.
      sampling: settings for the file's header.
      description: facts for the model card.
    """

    folder: PipelineFolder
    pairs: Mapping[str, Pair]
    scheduler: Mapping[str, Any] | None
    sampling: SamplingConfig
    description: Export


def write_lora_folder(
    out: Path, lora: LoraExport, *, keys: str = "diffusers", dtype=None, overwrite: bool = False
) -> dict[str, Any] | None:
    """Write a LoRA's folder atomically.

    Args:
      out: the folder.
      lora: its contents.
      keys: names of the modules, one of `lora_writer.KEYS`.
      dtype: of the tensors; None: float32.
      overwrite: replace an existing folder.

    Returns: result of the comparison with diffusers; None if it or PEFT is not installed.
    Raises: RunStopped if diffusers samples other images with the LoRA.
    """
    folder, kind = lora.folder, "diffusers" if has_loader(lora.folder) else "peft"
    description = lora.description.with_adapter(kind, lora.scheduler)
    facts = description.name, lora.sampling, description.license, "/lora"
    texts = modelspec(folder, *facts) | header_texts(lora.sampling)
    options = {"keys": keys, "dtype": dtype, "metadata": texts}
    with atomic_folder(out, overwrite=overwrite, marker=GADJAX_JSON) as new:
        write_lora(new, folder, lora.pairs, scheduler=lora.scheduler, **options)
        nodes = keys == COMFYUI and workflow(folder, lora.sampling, lora=DIFFUSERS_WEIGHTS)
        if nodes:
            (new / WORKFLOW).write_text(workflow_json(nodes), encoding="utf-8")
        (new / GADJAX_JSON).write_text(metadata_json(description, None), encoding="utf-8")
        verified = None
        if not parity.missing(lora=True):
            with as_diffusers_folder(folder.path, out) as src:
                verified = parity.verify_lora(check_pipeline(src).path, new, description.pipeline)
        (new / GADJAX_JSON).write_text(metadata_json(description, verified), encoding="utf-8")
        (new / CARD).write_text(card(description, verified), encoding="utf-8")
    return verified
