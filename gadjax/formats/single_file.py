"""Single files of weights: a backbone in diffusers' names, a whole checkpoint in the original ones.

Original releases of Stable Diffusion 1.5, SDXL and SD3 have denoiser, autoencoder and text encoders
in one file, each under a prefix.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import Component, PipelineFolder
from gadjax.formats.lora_writer import usage_hint
from gadjax.formats.pipeline_classes import FLUX, SD, SD3, SDXL
from gadjax.formats.safetensors_file import write_safetensors
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.formats.scheduler_config import parameterization_from_config
from gadjax.formats.state_dict import tensors_from_params
from gadjax.models.family import Backbone
from gadjax.models.text.open_clip import open_clip_tensors
from gadjax.models.vae.original import original as original_vae

Tensors = dict[str, np.ndarray]
DENOISER, VAE = "model.diffusion_model.", "first_stage_model."


class Encoder(NamedTuple):
    """Place of a text encoder in a checkpoint: prefix, and its tensors there."""

    prefix: str
    convert: Callable[[Mapping[str, np.ndarray]], Tensors] = dict


def _t5_tensors(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Tensors of T5 with both names of its token embedding, as diffusers' loader needs them."""
    shared = tensors["shared.weight"]
    return {**tensors, "encoder.embed_tokens.weight": shared}


# Pipeline -> its text encoders in the original release's checkpoint.
CHECKPOINTS = {
    SD: {"text_encoder": Encoder("cond_stage_model.transformer.")},
    SDXL: {
        "text_encoder": Encoder("conditioner.embedders.0.transformer."),
        "text_encoder_2": Encoder("conditioner.embedders.1.model.", open_clip_tensors),
    },
    SD3: {
        "text_encoder": Encoder("text_encoders.clip_l.transformer."),
        "text_encoder_2": Encoder("text_encoders.clip_g.transformer."),
        "text_encoder_3": Encoder("text_encoders.t5xxl.transformer.", _t5_tensors),
    },
}
# Depth of an MMDiT -> its release.
SD3_RELEASES = {24: "stable-diffusion-3-medium", 38: "stable-diffusion-3.5-large"}


def has_original_names(folder: PipelineFolder) -> bool:
    """True for a pipeline whose checkpoint is written in the original names: SD1.5, SDXL and SD3.

    Not Stable Diffusion 2, whose checkpoints have a layer more of the text encoder than diffusers'.
    """
    kind = folder.model_index.get("_class_name")
    if kind == SD:
        return folder.components["text_encoder"].spec.hidden_act == "quick_gelu"
    return kind in CHECKPOINTS


def network_tensors(part: Component) -> Tensors:
    """Tensors of a network by their keys in diffusers or transformers."""
    return dict(tensors_from_params(part.params, part.keymap, views=True))


def original_backbone(part: Component) -> Tensors:
    """Tensors of a backbone by their original names, fused and swapped as they are there.

    Raises: InputError for a tensor without an original name.
    """
    tensors, family = network_tensors(part), part.family
    assert isinstance(family, Backbone) and family.original
    names = {key.rpartition(".")[0] for key in tensors}
    result, used = {}, set()
    for name, entry in family.original(names, part.spec).items():
        suffixes = {
            key.rpartition(".")[2] for key in tensors if key.rpartition(".")[0] == entry.modules[0]
        }
        for suffix in suffixes:
            keys = [f"{module}.{suffix}" for module in entry.modules]
            rows = [np.asarray(tensors[key]) for key in keys]
            value = rows[0] if len(rows) == 1 else np.concatenate(rows)
            if entry.swapped:
                value = np.concatenate(np.split(value, 2)[::-1])
            # A parameter that is no weight or bias has its module's name.
            key = f"{name}.{suffix}" if suffix in ("weight", "bias") else name
            result[key] = value
            used.update(keys)
    if missing := sorted(tensors.keys() - used):
        raise InputError(f"{part.name}: found no original name of {missing[0]}; expected one")
    return result


def checkpoint_tensors(folder: PipelineFolder) -> Tensors:
    """Tensors of a whole pipeline as a checkpoint of its original release.

    folder: with parameters, one that `has_original_names`.
    """
    parts = folder.components
    result = {DENOISER + k: v for k, v in original_backbone(parts[folder.backbone]).items()}
    levels = len(parts["vae"].spec.block_out_channels)
    for key, value in network_tensors(parts["vae"]).items():
        name = original_vae(key, levels)
        # The attention's projections are 1 x 1 convolutions there.
        matrix = "mid.attn_1" in name and value.ndim == 2
        result[VAE + name] = value[..., None, None] if matrix else value
    for name, encoder in CHECKPOINTS[folder.model_index["_class_name"]].items():
        if name in parts:
            tensors = encoder.convert(network_tensors(parts[name]))
            result |= {encoder.prefix + key: value for key, value in tensors.items()}
    return result


def architecture(folder: PipelineFolder) -> str | None:
    """Architecture for the "modelspec" metadata; None where the specification has none."""
    kind, spec = folder.model_index.get("_class_name"), folder.components[folder.backbone].spec
    if kind == SDXL:
        return "stable-diffusion-xl-v1-base"
    if kind == SD3:
        dual = "stable-diffusion-3.5-medium" if spec.dual_layers else None
        return dual or SD3_RELEASES.get(spec.num_layers, "stable-diffusion-3-medium")
    if kind == FLUX:
        return "flux-1-dev" if spec.guidance_embeds else "flux-1-schnell"
    if kind == SD and has_original_names(folder):
        return "stable-diffusion-v1"
    velocity = parameterization_from_config(folder.scheduler) == "v"
    return f"stable-diffusion-v2-{'768-v' if velocity else '512'}" if kind == SD else None


def modelspec(
    folder: PipelineFolder, title: str, sampling: SamplingConfig, license: str, kind: str = ""
) -> dict[str, str]:
    """Texts of the header that user interfaces show, by the modelspec of Stability AI, 1.0.1.

    Args:
      folder: the pipeline.
      title: name of the model.
      sampling: its sampling settings.
      license: of the weights.
      kind: end of the architecture's name, "/lora" for a LoRA.
    """
    name = architecture(folder)
    part = folder.components[folder.backbone]
    side = part.spec.sample_size * folder.components["vae"].spec.upscale
    prediction = parameterization_from_config(folder.scheduler)
    texts = {
        "sai_model_spec": "1.0.1",
        "architecture": name and name + kind,
        "implementation": "diffusers",
        "title": title,
        "resolution": f"{side}x{side}",
        "license": license,
        "usage_hint": usage_hint(sampling),
        "prediction_type": {"eps": "epsilon", "v": "v"}.get(prediction),
    }
    return {f"modelspec.{name}": text for name, text in texts.items() if text}


def write_single_file(
    path: Path, tensors: Mapping[str, np.ndarray], texts: Mapping[str, str], dtype=None
) -> None:
    """Write one safetensors file.

    Args:
      path: the file.
      tensors: by key.
      texts: of the header.
      dtype: of the tensors; None keeps theirs.
    """
    write_safetensors(path, tensors, dtype, texts)
