"""Names of Z-Image's modules in the original release, which ComfyUI has too."""

import re
from collections.abc import Collection

from gadjax.models.keymap import Original
from gadjax.models.zimage.config import Config

RENAMES = (
    (r"\.attention\.to_out\.0$", ".attention.out"),
    (r"^all_(x_embedder|final_layer)\.2-1", r"\1"),
)


def original(names: Collection[str], config: Config) -> dict[str, Original]:
    """Original modules with the modules in diffusers that their rows are.

    Args:
      names: of the modules in diffusers.
      config: the network's options.
    """
    table = {}
    for name in names:
        ours = name
        for pattern, replacement in RENAMES:
            ours = re.sub(pattern, replacement, ours)
        if match := re.fullmatch(r"(.*\.attention)\.to_q", ours):
            parts = tuple(f"{match[1]}.to_{part}" for part in "qkv")
            table[f"{match[1]}.qkv"] = Original(parts)
        elif not re.search(r"\.attention\.to_[kv]$", ours):
            table[ours] = Original((name,))
    return table
