"""Names of the U-Net's modules in the original releases of Stable Diffusion."""

import re
from collections.abc import Collection

from gadjax.models.keymap import Original
from gadjax.models.unet.config import Config

RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original(names: Collection[str], config: Config) -> dict[str, Original]:
    """Original name of every module, by the names in diffusers.

    Args:
      names: of the modules in diffusers.
      config: the network's options.
    """
    return {_original(name, names, config): Original((name,)) for name in names}


def _original(name: str, names: Collection[str], config: Config) -> str:
    if name in OUTER:
        return OUTER[name]
    entries = config.layers_per_block + 1  # of a level in the original's list
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+?)s\.(\d+)\.(.*)", name)
    side, level, kind, index, rest = match.groups()
    level, index = int(level or 0), int(index)
    rest = RESNET[rest] if kind == "resnet" else rest
    number = int(kind == "attention")
    if side == "mid":  # resnet, attention, resnet
        return f"middle_block.{1 if number else 2 * index}.{rest}"
    if side == "down":
        if kind == "downsampler":
            return f"input_blocks.{level * entries + entries}.0.op"
        return f"input_blocks.{1 + level * entries + index}.{number}.{rest}"
    if kind == "upsampler":
        number = 2 if f"up_blocks.{level}.attentions.0.proj_in" in names else 1
        return f"output_blocks.{level * entries + entries - 1}.{number}.conv"
    return f"output_blocks.{level * entries + index}.{number}.{rest}"
