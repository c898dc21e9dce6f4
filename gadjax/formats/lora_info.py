"""Summary of a LoRA file without its pipeline: kind, form of the keys, ranks, scales, family."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gadjax.errors import InputError, escape_nonprintable, short_repr
from gadjax.formats.lora_header import open_lora, other_kinds, split_key
from gadjax.formats.safetensors_file import Tensor
from gadjax.io.untrusted import is_number

MAX_VALUES = 8  # ranks, scales or texts in one line
# Start of a module's spelling -> the form of a file's keys.
FORMS = (
    (r"lora_unet_(input|middle|output|joint|double|single)_block", "kohya, original modules"),
    (r"lora_(unet|te\d?)_", "kohya, modules of diffusers"),
    (r"lora_transformer_", "OneTrainer"),
    (r"lycoris_", "SimpleTuner"),
    (r"(diffusion_model\.)?(double|single)_blocks\.\d+\.processor\.", "x-labs"),
    (r"diffusion_model\.", "ComfyUI"),
    (r"base_model\.model\.", "PEFT"),
    (r"(unet|transformer|text_encoder(_\d)?)\.", "diffusers"),
    (r"", "modules without a prefix"),
)
TEXT = re.compile(r"(lora_te\d?_|text_encoder(_\d)?\.)")
UNET = "U-Net"
# Part of a module's name, with dots as underscores -> the family of the network.
FAMILIES = (
    (r"single_transformer_blocks|double_blocks|single_blocks", "FLUX"),
    (r"(img|txt)_(mlp|mod)", "Qwen-Image (not supported)"),
    (r"joint_blocks|add_[qkv]_proj|to_add_out", "Stable Diffusion 3"),
    (r"(layers|refiner)_\d+_(attn_|feed_forward_linear)", "Lumina 2"),
    (r"(noise|context)_refiner|layers_\d+_(attention|feed_forward)", "Z-Image"),
    (r"conv_(inverted|point)", "SANA"),
    (r"(down|up|mid|input|output|middle)_blocks?_", UNET),
    (r"cross_attn_(q|kv)_linear|adaln_single", "PixArt"),
    (r"transformer_blocks_\d+_(attn\d|ff)", "PixArt or SANA"),
)
# Width of the prompt embeddings in a U-Net's cross-attention -> its model.
WIDTHS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL"}
CROSS_ATTENTION = re.compile(r"attn2[._]to_[kv]$")


def lora_lines(path: Path) -> list[str]:
    """Lines of text on a LoRA: what it adapts, how its keys are spelt, ranks and scales, metadata.

    Adapters of other kinds are named; the other commands refuse them.

    path: a safetensors file, or a folder of diffusers or PEFT.
    Raises: InputError for another file, or one without adapters.
    """
    opened = open_lora(path)
    tensors, kinds = opened.tensors, other_kinds(opened.tensors)
    stems: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if split := split_key(key):
            stems.setdefault(split[0], {})[split[1]] = tensor
    if not stems and not kinds:
        raise InputError(f"{opened.path}: found {len(tensors)} tensors of no adapter; expected one")
    numbers = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors.values())
    types = Counter(str(tensor.dtype) for tensor in tensors.values())
    lines = [
        f"{opened.path}: {', '.join(kinds) or 'LoRA'}",
        f"tensors: {len(tensors)}, {numbers / 1e6:.2f} million numbers ({_counts(types)})",
    ]
    if kinds:
        lines.append("the kind is refused by the other commands")
    lines.append(f"keys: {_counts(Counter(map(_form, stems or tensors)))}")
    lines.append(f"networks: {_counts(Counter(_networks(stems)))}")
    ranks, scales = Counter(), Counter()
    for stem, parts in stems.items():
        if "A" in parts and parts["A"].shape:
            rank = parts["A"].shape[0]
            ranks[str(rank)] += 1
            scales[_scale(opened, stem, parts, rank)] += 1
    if ranks:
        lines += [f"ranks: {_counts(ranks)}", f"scales: {_counts(scales)}"]
    return lines + [f"metadata: {line}" for line in _metadata(opened.metadata)]


def _counts(counter: Counter) -> str:
    common = [f"{escape_nonprintable(name)}: {n}" for name, n in counter.most_common(MAX_VALUES)]
    return ", ".join(common) + (", ..." if len(counter) > MAX_VALUES else "")


def _form(stem: str) -> str:
    return next(name for pattern, name in FORMS if re.match(pattern, stem))


def _networks(stems: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Network of every module, by its name."""
    widths = {
        parts["A"].shape[1]
        for stem, parts in stems.items()
        if CROSS_ATTENTION.search(stem) and "A" in parts and len(parts["A"].shape) > 1
    }
    model = WIDTHS.get(next(iter(widths), 0)) if len(widths) == 1 else None
    plain = {
        stem: next((name for pattern, name in FAMILIES if re.search(pattern, spelling)), "unknown")
        for stem in stems
        if not TEXT.match(stem)
        for spelling in [stem.replace(".", "_")]
    }
    kinds = [name for name in plain.values() if name != "unknown"]
    # One module may belong to several families: the first of the table that any module has.
    first = next((name for _, name in FAMILIES if name in kinds), "unknown")
    name = f"{UNET} of {model}" if first == UNET and model else first
    return ["text encoder" if TEXT.match(stem) else name for stem in stems]


def _scale(opened, stem: str, parts: Mapping[str, Tensor], rank: int) -> str:
    if "alpha" not in parts:
        return f"{opened.settings_of(_component(stem)).scale(stem, max(rank, 1)):g}"
    value = np.asarray(parts["alpha"].read(), np.float64).ravel()
    if value.size != 1 or not is_number(alpha := float(value[0])) or not rank:
        return "not readable"
    return f"{alpha / rank:g} (alpha {alpha:g})"


def _component(stem: str) -> str:
    match = re.match(r"(unet|transformer|text_encoder(?:_\d)?)\.", stem)
    return match[1] if match else ""


def _metadata(metadata: Mapping[str, str]) -> list[str]:
    shown = [f"{escape_nonprintable(key)[:80]}: {short_repr(metadata[key])}" for key in metadata]
    more = [f"{len(shown) - MAX_VALUES} more"] if len(shown) > MAX_VALUES else []
    return shown[:MAX_VALUES] + more
