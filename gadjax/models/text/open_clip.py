"""Names of a CLIP text encoder's tensors in OpenCLIP, which original releases of SDXL have."""

import re
from collections.abc import Mapping

import numpy as np

OUTER = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of transformers' CLIPTextModelWithProjection as OpenCLIP has them.

    tensors: by their keys, with the prefix "text_model.".
    """
    result = {}
    for key, value in tensors.items():
        if key in OUTER:
            result[OUTER[key]] = value.T if key == "text_projection.weight" else value
            continue
        number, name, part = re.fullmatch(
            r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", key
        ).groups()
        stem = f"transformer.resblocks.{number}."
        if name in LAYER:
            result[f"{stem}{LAYER[name]}.{part}"] = value
        elif name == "self_attn.q_proj":  # the three are one matrix there
            three = [key.replace("q_proj", f"{x}_proj") for x in "qkv"]
            fused = np.concatenate([np.asarray(tensors[x]) for x in three])
            result[f"{stem}attn.in_proj_{part}"] = fused
    return result
