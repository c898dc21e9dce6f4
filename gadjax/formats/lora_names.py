"""Names of adapters' modules in the files of diffusers, PEFT, kohya and ComfyUI."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gadjax.formats.diffusers_folder import Component, PipelineFolder
from gadjax.formats.state_dict import expected_shapes
from gadjax.models.adapters import adaptable
from gadjax.models.family import Backbone
from gadjax.models.keymap import Original

# FLUX.1's module in the original release -> in a block's processor in the files of x-labs, whose
# single blocks adapt q, k and v of `linear1` alone.
XLABS = {
    "img_attn.qkv": "qkv_lora1",
    "img_attn.proj": "proj_lora1",
    "txt_attn.qkv": "qkv_lora2",
    "txt_attn.proj": "proj_lora2",
    "linear1": "qkv",
    "linear2": "proj",
}


class Layer(NamedTuple):
    """Kernel of a module: path of the parameter, index in a stack or None, torch's shape."""

    path: str
    index: int | None
    shape: tuple[int, ...]


class Place(NamedTuple):
    """Network of an adapter, and the modules whose rows it changes."""

    component: str
    original: Original


def layers_of(part: Component) -> dict[str, Layer]:
    """Kernels of a network that an adapter fits, by the module's name in diffusers."""
    kernels = adaptable(part.abstract)
    return {
        key.removesuffix(".weight"): Layer(*where)
        for key, where in expected_shapes(part.abstract, part.keymap).items()
        if where[0] in kernels
    }


def adapted_parts(folder: PipelineFolder) -> dict[str, Component]:
    """Networks of a pipeline that adapters are for, by name: all but the autoencoder."""
    return {name: part for name, part in folder.components.items() if name != "vae"}


def places(folder: PipelineFolder, layers: Mapping[str, Mapping[str, Layer]]) -> dict[str, Place]:
    """Every known spelling of every module of a pipeline's networks -> what it stands for.

    Args:
      folder: the pipeline.
      layers: modules of its networks, as `layers_of` returns them.
    """
    spelt: dict[str, Place] = {}
    texts = [name for name in layers if name != folder.backbone]
    for name in texts:
        prefixes = tuple(_kohya_text(name, len(texts), folder.components[name]))
        for module in layers[name]:
            place = Place(name, Original((module,)))
            for spelling in _text_spellings(name, module):
                spelt[spelling] = place
            for prefix in prefixes:
                spelt[prefix + module.replace(".", "_")] = place
    part = folder.components[folder.backbone]
    for module in layers[folder.backbone]:
        place = Place(folder.backbone, Original((module,)))
        for spelling in _backbone_spellings(folder.backbone, module):
            spelt[spelling] = place
    family = part.family
    if isinstance(family, Backbone) and family.original:
        for name, entry in family.original(layers[folder.backbone].keys(), part.spec).items():
            place = Place(folder.backbone, entry)
            flat = name.replace(".", "_")
            for prefix in ("diffusion_model.", "base_model.model.", ""):
                spelt.setdefault(f"{prefix}{name}", place)
            spelt.setdefault(f"lora_unet_{flat}", place)
            *block, module = name.split(".", 2)
            if "FluxTransformer2DModel" in family.class_names and module in XLABS:
                place = Place(folder.backbone, Original(entry.modules[:3]))
                for prefix in ("diffusion_model.", ""):
                    spelt[f"{prefix}{'.'.join(block)}.processor.{XLABS[module]}"] = place
    return spelt


def _text_spellings(name: str, module: str) -> Iterator[str]:
    """Spellings of a module of a text encoder by diffusers' name of it."""
    short = module.removeprefix("text_model.")  # as transformers 5 names them
    # Older versions of diffusers gave its attention the names of a U-Net's.
    older = re.sub(r"(self_attn\.)(q|k|v|out)_proj$", r"\1to_\2", short)
    for spelling in dict.fromkeys((module, f"text_model.{short}", short, f"text_model.{older}")):
        yield f"{name}.{spelling}"


def _backbone_spellings(backbone: str, module: str) -> Iterator[str]:
    """Spellings of a module of the backbone by diffusers' name of it."""
    yield module
    for prefix in (backbone, "base_model.model", "diffusion_model"):
        yield f"{prefix}.{module}"
    # Before diffusers 0.21 the attention's processor had the adapters.
    match = re.fullmatch(r"(.*\.attn\d?)\.(to_\w+?)(\.0)?", module)
    if match:
        yield f"{backbone}.{match[1]}.processor.{match[2]}"
    flat = module.replace(".", "_")
    for prefix in ("lora_unet_", "lora_transformer_", "lycoris_"):
        yield prefix + flat


def _kohya_text(name: str, count: int, part: Component) -> Iterator[str]:
    """Prefixes of a text encoder's modules in kohya's files.

    Args:
      name: of the text encoder.
      count: of text encoders.
      part: the text encoder; T5 has the third's name in FLUX.1 too, where it is the second.
    """
    number = name.removeprefix("text_encoder").removeprefix("_") or "1"
    yield f"lora_te{number}_"
    if count == 1:
        yield "lora_te_"
    if "T5EncoderModel" in part.family.class_names:
        yield "lora_te3_"


def kohya_name(backbone_module: str) -> str:
    """Name of a module of the backbone in kohya's files, from that in diffusers."""
    return "lora_unet_" + backbone_module.replace(".", "_")
