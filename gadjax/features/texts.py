"""Text towers of scorers: prompts to vectors that are compared with those of pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gadjax.errors import InputError, check_choice
from gadjax.features.network import compiled, load_params, read_config
from gadjax.io.untrusted import read_json
from gadjax.models.config import refuse
from gadjax.models.keymap import KeyMap
from gadjax.models.module import Functional, functional
from gadjax.models.text import clip, siglip
from gadjax.models.text.tokenizer import Tokenizer, load_tokenizer
from gadjax.models.vision.config import tower

# Class of SigLIP's tokenizer in tokenizer_config.json -> class that reads its files. Siglip2's is
# Gemma's with lower case, which texts are in anyway.
SIGLIP_TOKENIZERS = {
    "SiglipTokenizer": "SiglipTokenizer",
    "GemmaTokenizer": "GemmaTokenizer",
    "Siglip2Tokenizer": "GemmaTokenizer",
}
VISION_WIDTH = 768  # transformers' default


def load_text_encoder(folder: Path, truncated: set[str]) -> Callable[[Sequence[str]], np.ndarray]:
    """Load the text tower of a CLIPModel or a SiglipModel: prompts -> vectors [N, P].

    Args:
      folder: config.json, weights, and the tokenizer's files.
      truncated: receives the prompts that are longer than the tower takes.

    Raises: InputError for files that are missing, malformed or unsupported.
    """
    cfg = read_config(folder)
    kind = cfg.get("model_type")
    if kind not in _LOADERS:
        raise InputError(
            f"{folder}: found no text tower; expected the folder of a CLIPModel or a SiglipModel"
        )
    try:
        network, keymap, length, read = _LOADERS[kind](folder, cfg)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}, text_config: {error}") from None
    params, _ = load_params(folder, network, keymap)
    tokenizer = read()
    run = compiled(lambda params, ids: _vectors(network.apply(params, ids)))

    def encode(prompts: Sequence[str]) -> np.ndarray:
        texts = [prompt.lower() for prompt in prompts] if kind == "siglip" else list(prompts)
        truncated.update(_too_long(tokenizer, prompts, texts, length))
        ids_BL, _ = tokenizer(texts, length)
        # One by one in a fixed shape: texts are few beside pictures.
        on_device = jax.device_put(params)
        return np.concatenate([np.asarray(run(on_device, ids[None])) for ids in ids_BL])

    return encode


def _vectors(encoded: clip.Encoded | jax.Array) -> jax.Array:
    return encoded.pooled if isinstance(encoded, clip.Encoded) else encoded


Loaded = tuple[Functional, KeyMap, int, Callable[[], Tokenizer]]


def _load_clip(folder: Path, cfg: Mapping[str, Any]) -> Loaded:
    options = tower(cfg, "text") | {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "projection_dim": cfg.get("projection_dim", 512),
    }
    config = clip.Config.from_dict(options)
    keymap = KeyMap(
        renames=clip.FAMILY.keymap.renames,
        ignored=(*clip.FAMILY.keymap.ignored, r"^vision_model\.", r"^visual_", r"^logit_scale$"),
    )
    network = functional(clip.build(config, remat=False))
    return (
        network,
        keymap,
        config.max_position_embeddings,
        lambda: load_tokenizer(folder, "CLIPTokenizer", clean=False, vocab_size=config.vocab_size),
    )


def _load_siglip(folder: Path, cfg: Mapping[str, Any]) -> Loaded:
    config = siglip.Config.from_dict(tower(cfg, "text"))
    width = tower(cfg, "vision").get("hidden_size", VISION_WIDTH)
    if config.width != width:
        refuse("projection_size", config.width, f"{width}, the width of the pictures' vectors")

    def read() -> Tokenizer:
        path = folder / "tokenizer_config.json"
        name = read_json(path).get("tokenizer_class")
        name = name.removesuffix("Fast") if isinstance(name, str) else name
        check_choice(f"{path}: tokenizer_class", name, SIGLIP_TOKENIZERS)
        kind = SIGLIP_TOKENIZERS[name]
        return load_tokenizer(folder, kind, clean=False, vocab_size=config.vocab_size)

    network = functional(siglip.build(config))
    return network, siglip.KEYMAP, config.max_position_embeddings, read


_LOADERS: dict[str, Callable[[Path, Mapping[str, Any]], Loaded]] = {
    "clip": _load_clip,
    "siglip": _load_siglip,
}


def _too_long(
    tokenizer: Tokenizer, prompts: Sequence[str], texts: Sequence[str], length: int
) -> list[str]:
    """Prompts whose texts have more tokens than `length`."""
    ids = tokenizer.backend(list(texts), truncation=False)["input_ids"]
    return [prompt for prompt, tokens in zip(prompts, ids, strict=True) if len(tokens) > length]
