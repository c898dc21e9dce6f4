"""Rules of diffusers' pipeline classes that are not in the folder's files.

They follow `__init__` and `__call__` of the classes in diffusers 0.42. Each is a row of the table
in docs/models.md.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gadjax.errors import InputError, short_repr
from gadjax.formats.scheduler_config import EULER, FLOW_EULER, FLOW_LCM, PIXART, SCM

SD, SDXL, SD3 = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"
SIGMA, SANA, SPRINT = "PixArtSigmaPipeline", "SanaPipeline", "SanaSprintPipeline"
FLUX, KLEIN, LUMINA = "FluxPipeline", "Flux2KleinPipeline", "Lumina2Pipeline"
QWEN, Z_IMAGE = "QwenImagePipeline", "ZImagePipeline"

# They pass n evenly spaced sigmas of their own to their scheduler, not n alone.
PASSES_SIGMAS = (FLUX, KLEIN, LUMINA, QWEN, Z_IMAGE)
UNSCALED = (SANA, SD3, *PASSES_SIGMAS)  # none calls scale_model_input
PACKED = (FLUX, QWEN)  # the `latents` of their call are packed, by _pack_latents
SHIFTED = (SD3, FLUX, LUMINA, Z_IMAGE)  # they add the shift_factor of an autoencoder

_CLIP, _PROJECTED = ("CLIPTextModel",), ("CLIPTextModelWithProjection",)
_KL, _UNET = {"vae": ("AutoencoderKL",)}, {"unet": ("UNet2DConditionModel",)}
_QWEN3 = {"text_encoder": ("Qwen3Model", "Qwen3ForCausalLM")}
_PIXART = _KL | {
    "transformer": ("PixArtTransformer2DModel", "Transformer2DModel"),
    "text_encoder": ("T5EncoderModel",),
}
_SANA = {
    "transformer": ("SanaTransformer2DModel",),
    "text_encoder": ("Gemma2Model",),
    "vae": ("AutoencoderDC",),
}
# Pipeline -> classes of its networks. A CLIP with a projection returns its pooled vector first, so
# that a pipeline for a CLIP without one would take it for the hidden states, and the reverse.
PIPELINES: dict[str, dict[str, tuple[str, ...]]] = {
    SD: _KL | _UNET | {"text_encoder": _CLIP},
    SDXL: _KL | _UNET | {"text_encoder": _CLIP, "text_encoder_2": _PROJECTED},
    PIXART: _PIXART,
    SIGMA: _PIXART,
    SANA: _SANA,
    SPRINT: _SANA,
    SD3: _KL
    | {
        "transformer": ("SD3Transformer2DModel",),
        "text_encoder": _PROJECTED,
        "text_encoder_2": _PROJECTED,
        "text_encoder_3": ("T5EncoderModel",),
    },
    LUMINA: _KL | {"transformer": ("Lumina2Transformer2DModel",), "text_encoder": ("Gemma2Model",)},
    Z_IMAGE: _KL | _QWEN3 | {"transformer": ("ZImageTransformer2DModel",)},
    KLEIN: _QWEN3 | {"transformer": ("Flux2Transformer2DModel",), "vae": ("AutoencoderKLFlux2",)},
    FLUX: _KL
    | {
        "transformer": ("FluxTransformer2DModel",),
        "text_encoder": _CLIP,
        "text_encoder_2": ("T5EncoderModel",),
    },
}


def check_classes(path: Path, index: Mapping[str, Any]) -> None:
    """Check that a pipeline class is supported and fits its networks and scheduler.

    path, index: model_index.json and its contents.
    Raises: InputError for another pipeline class, network class or scheduler.
    """
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise InputError(
            f"{path}, _class_name: found {short_repr(kind)}; expected one of {', '.join(PIPELINES)}"
        )
    for name, classes in PIPELINES[kind].items():
        entry = index.get(name)
        if isinstance(entry, list) and entry[-1] not in (None, *classes):
            raise InputError(
                f"{path}, {name}: found {short_repr(entry[-1])}; expected {' or '.join(classes)} "
                f"in a {kind}"
            )
    entry = index.get("scheduler")
    scheduler = entry[-1] if isinstance(entry, list) else None
    if (kind == SPRINT) != (scheduler == SCM):
        raise InputError(
            f"{path}, scheduler: found {short_repr(scheduler)} of a {kind}; expected {SCM} of "
            f"{SPRINT} alone, which passes the network another time and latent"
        )
    if scheduler == EULER and kind in UNSCALED:
        raise InputError(
            f"{path}, scheduler: found {EULER}; expected another, as {kind} does not scale latents "
            "for it"
        )
    if scheduler in (FLOW_EULER, FLOW_LCM) and kind not in UNSCALED:
        raise InputError(
            f"{path}, scheduler: found {scheduler}; expected another, as it has no "
            f"scale_model_input, which {kind} calls"
        )
    if scheduler not in (FLOW_EULER, FLOW_LCM) and kind in PASSES_SIGMAS:
        raise InputError(
            f"{path}, scheduler: found {short_repr(scheduler)}; expected {FLOW_EULER} or "
            f"{FLOW_LCM}, which take the sigmas that {kind} passes"
        )


def effective_scheduler_config(
    index: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """A scheduler_config.json as the pipeline uses it.

    The class is the one in model_index.json; values listed in `_use_default_values` are dropped.
    StableDiffusionPipeline overrides two outdated settings: steps_offset and clip_sample.
    """
    effective = _without_defaults(config, "scheduler_config.json")
    entry = index.get("scheduler")
    if isinstance(entry, list) and isinstance(entry[-1], str):
        effective["_class_name"] = entry[-1]
    if index.get("_class_name") == SD:
        effective["steps_offset"] = 1
        if effective.get("clip_sample", True) is True:
            effective["clip_sample"] = False
    return effective


def effective_network_config(
    index: Mapping[str, Any], name: str, config: Mapping[str, Any]
) -> dict[str, Any]:
    """A network's config.json as the pipeline uses it.

    diffusers' classes drop the values listed in `_use_default_values`, transformers' do not.
    """
    effective, kind = dict(config), index.get("_class_name")
    entry = index.get(name)
    if isinstance(entry, list) and entry[0] == "diffusers":
        effective = _without_defaults(effective, f"{name}/config.json")
    if kind == SD and name == "unet" and _before_0_9(config.get("_diffusers_version")):
        side = config.get("sample_size")
        effective["sample_size"] = max(side, 64) if type(side) is int else side
    if kind in PIPELINES and kind not in SHIFTED and name == "vae":
        effective.pop("shift_factor", None)
    return effective


def _without_defaults(config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """A config without the values that it lists as its class's defaults."""
    defaults = config.get("_use_default_values") or []
    if not isinstance(defaults, list):
        raise InputError(
            f"{file}, _use_default_values: found {short_repr(defaults)}; expected a list of keys"
        )
    return {key: value for key, value in config.items() if key not in defaults}


def _before_0_9(version: Any) -> bool:
    match = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return match is not None and (int(match[1]), int(match[2])) < (0, 9)
