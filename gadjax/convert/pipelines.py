"""What a pipeline of diffusers decides beside what its folder says, as `__init__` and `__call__` of
its class do in diffusers 0.42. Every one of these is a row of the table in docs/models.md.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gadjax.errors import InputError
from gadjax.scheduler_config import EULER, PIXART, SCM
from gadjax.shown import shown

SD, SDXL, SD3 = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"
SIGMA, SANA, SPRINT = "PixArtSigmaPipeline", "SanaPipeline", "SanaSprintPipeline"

UNSCALED = (SANA, SD3)  # neither calls scale_model_input

_CLIP, _PROJECTED = ("CLIPTextModel",), ("CLIPTextModelWithProjection",)
_KL, _UNET = {"vae": ("AutoencoderKL",)}, {"unet": ("UNet2DConditionModel",)}
_PIXART = _KL | {
    "transformer": ("PixArtTransformer2DModel", "Transformer2DModel"),
    "text_encoder": ("T5EncoderModel",),
}
_SANA = {
    "transformer": ("SanaTransformer2DModel",),
    "text_encoder": ("Gemma2Model",),
    "vae": ("AutoencoderDC",),
}
# Pipeline -> the classes of its networks. A CLIP with a projection says its pooled vector first, so
# that a pipeline made for one without takes that for its states, and the reverse.
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
}


def check_classes(path: Path, index: Mapping[str, Any]) -> None:
    """index: model_index.json, which is at `path`.

    Raises: InputError for a pipeline that is none of these, or is not made for its networks or its
    scheduler.
    """
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise InputError(
            f"{path}, _class_name: found {shown(kind)}; expected one of {', '.join(PIPELINES)}"
        )
    for name, classes in PIPELINES[kind].items():
        entry = index.get(name)
        if isinstance(entry, list) and entry[-1] not in (None, *classes):
            raise InputError(
                f"{path}, {name}: found {shown(entry[-1])}; expected {' or '.join(classes)}, for "
                f"which {kind} is made"
            )
    entry = index.get("scheduler")
    scheduler = entry[-1] if isinstance(entry, list) else None
    if (kind == SPRINT) != (scheduler == SCM):
        raise InputError(
            f"{path}, scheduler: found {shown(scheduler)} of a {kind}; expected {SCM} of {SPRINT} "
            "alone, which tells the network another time and latent"
        )
    if scheduler == EULER and kind in UNSCALED:
        raise InputError(
            f"{path}, scheduler: found {EULER}; expected another, as {kind} does not scale latents "
            "for it"
        )


def corrected_scheduler(index: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json as the pipeline uses it: of the class that model_index.json names,
    without the values that it lists as defaults; Stable Diffusion's without two old faults."""
    found = _without_defaults(config, "scheduler_config.json")
    entry = index.get("scheduler")
    if isinstance(entry, list) and isinstance(entry[-1], str):
        found["_class_name"] = entry[-1]
    if index.get("_class_name") == SD:
        found["steps_offset"] = 1
        if found.get("clip_sample", True) is True:
            found["clip_sample"] = False
    return found


def corrected_network(
    index: Mapping[str, Any], name: str, config: Mapping[str, Any]
) -> dict[str, Any]:
    """A network's config.json as the pipeline uses it; diffusers' classes go without the values
    that it lists as defaults."""
    found, kind = dict(config), index.get("_class_name")
    entry = index.get(name)
    if isinstance(entry, list) and entry[0] == "diffusers":
        found = _without_defaults(found, f"{name}/config.json")
    if kind == SD and name == "unet" and _before_0_9(config.get("_diffusers_version")):
        side = config.get("sample_size")
        found["sample_size"] = max(side, 64) if type(side) is int else side
    if kind in PIPELINES and kind != SD3 and name == "vae":
        found.pop("shift_factor", None)  # which StableDiffusion3Pipeline alone adds
    return found


def _without_defaults(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    defaults = config.get("_use_default_values") or []
    if not isinstance(defaults, list):
        raise InputError(
            f"{where}, _use_default_values: found {shown(defaults)}; expected a list of keys"
        )
    return {key: value for key, value in config.items() if key not in defaults}


def _before_0_9(version: Any) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) < (0, 9)
