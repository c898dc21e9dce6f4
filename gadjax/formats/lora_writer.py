"""Write adapters as files of diffusers, kohya and PEFT.

The scale is multiplied into B, so that no file needs an alpha: readers differ in where they look
for one, and all of them take a scale of 1 without it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gadjax.formats.diffusers_folder import SCHEDULER, Component, PipelineFolder
from gadjax.formats.lora_header import DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS, SAMPLING
from gadjax.formats.lora_names import kohya_name, layers_of
from gadjax.formats.safetensors_file import write_safetensors
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.formats.state_dict import kernel_to_torch
from gadjax.models.params import flatten
from gadjax.types import Params

# Pipelines of diffusers that have `load_lora_weights`.
LORA_LOADERS = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "Lumina2Pipeline",
    "ZImagePipeline",
    "FluxPipeline",
    "Flux2KleinPipeline",
    "SanaPipeline",
    "SanaSprintPipeline",
)
KEYS = "diffusers", "kohya", "comfyui"


class Pair(NamedTuple):
    """Factors of a module in torch's layout, the scale in B."""

    a: np.ndarray
    b: np.ndarray


def pairs_of(adapters: Params, part: Component) -> dict[str, Pair]:
    """Factors of every adapted module of a network, by its name in diffusers.

    Args:
      adapters: adapters of NumPy arrays, nested at their kernels' paths.
      part: the network.
    """
    flat, pairs = flatten(adapters), {}
    for module, (path, index, _) in layers_of(part).items():
        if path not in flat:
            continue
        a, b = flat[path].a, flat[path].b * np.float32(flat[path].scale)
        if index is not None:
            a, b = a[index], b[index]
        pairs[module] = Pair(kernel_to_torch(a), kernel_to_torch(b))
    return pairs


def has_loader(folder: PipelineFolder) -> bool:
    """True for a pipeline whose class in diffusers has `load_lora_weights`."""
    return folder.model_index.get("_class_name") in LORA_LOADERS


def header_texts(sampling: SamplingConfig) -> dict[str, str]:
    """Texts of a LoRA's header from which gadjax reads the sampling settings."""
    return {SAMPLING: json.dumps(sampling.to_dict() | {"rollout": sampling.rollout})}


def usage_hint(sampling: SamplingConfig) -> str:
    """Sentence for user interfaces that show "modelspec.usage_hint"."""
    if sampling.timesteps is None:
        return f"{sampling.steps} steps, guidance {sampling.guidance:g}"
    times = ", ".join(f"{t:g}" for t in sampling.timesteps)
    guided = sampling.guidance > 1
    guidance = f"guidance {sampling.guidance:g}" if guided else "without guidance (cfg 1)"
    return f"{sampling.steps} steps from timesteps {times}, {guidance}"


def write_lora(
    new: Path,
    folder: PipelineFolder,
    pairs: Mapping[str, Pair],
    *,
    scheduler: Mapping[str, Any] | None = None,
    **options,
) -> None:
    """Write a LoRA's files into a folder: for diffusers, for PEFT where that has no loader, and the
    scheduler.

    Args:
      new: the folder.
      folder: the pipeline that is adapted.
      pairs: factors by module of its backbone.
      scheduler: scheduler config; None where it is the pipeline's.
      options: `keys`, `dtype` and `metadata` of `write_diffusers`.
    """
    write_diffusers(new, folder.backbone, pairs, **options)
    if not has_loader(folder):
        write_peft(new, pairs, options.get("dtype"), options.get("metadata"))
    write_scheduler(new, scheduler)


def write_scheduler(new: Path, scheduler: Mapping[str, Any] | None) -> None:
    """Write the scheduler's config of a folder; none for None."""
    if scheduler is not None:
        (new / SCHEDULER).parent.mkdir()
        text = json.dumps(scheduler, indent=2, sort_keys=True) + "\n"
        (new / SCHEDULER).write_text(text, encoding="utf-8")


def write_diffusers(
    folder: Path,
    backbone: str,
    pairs: Mapping[str, Pair],
    *,
    keys: str = "diffusers",
    dtype=None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the file that `load_lora_weights` of a diffusers pipeline reads from a folder.

    Args:
      folder: the folder.
      backbone: "unet" or "transformer".
      pairs: factors by module.
      keys: "diffusers", "kohya", or "comfyui", kohya's for U-Nets and diffusers' for transformers,
        the only forms of which ComfyUI takes all modules.
      dtype: of the tensors; None: float32.
      metadata: texts of the header, by name.
    """
    tensors, by_kohya = {}, keys == "kohya" or keys == "comfyui" and backbone == "unet"
    for module, (a, b) in pairs.items():
        if by_kohya:
            name = kohya_name(module)
            tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        else:
            name = f"{backbone}.{module}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    write_safetensors(folder / DIFFUSERS_WEIGHTS, tensors, dtype, metadata)


def write_peft(
    folder: Path, pairs: Mapping[str, Pair], dtype=None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the two files that `peft.PeftModel.from_pretrained` reads from a folder.

    Args:
      folder: the folder.
      pairs: factors by module.
      dtype: of the tensors; None: float32.
      metadata: texts of the header, by name.
    """
    tensors = {}
    for module, (a, b) in pairs.items():
        name = f"base_model.model.{module}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    write_safetensors(folder / PEFT_WEIGHTS, tensors, dtype, metadata)
    rank = len(next(iter(pairs.values())).a)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,  # a scale of 1
        "target_modules": sorted(pairs),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
