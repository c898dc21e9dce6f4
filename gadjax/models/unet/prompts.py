"""The prompts of Stable Diffusion 1.x and 2.x (one CLIP) and of SDXL (two).

Follows diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline. The network reads the
states of the padding too, so that the mask says nothing to it; it is all ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from gadjax.errors import InputError
from gadjax.models.text.prompts import (
    PromptEmbeds,
    TextComponents,
    check_clip_length,
    check_width,
    concat_tokens,
)
from gadjax.models.text.tokenizer import Tokenizer
from gadjax.models.unet.config import Config

SDXL = "StableDiffusionXLPipeline"


@dataclass(frozen=True, eq=False)
class ClipPromptEncoder:
    """CLIP's last states. masked: whether padding is hidden from it (use_attention_mask)."""

    tokenizer: Tokenizer
    apply: Callable
    length: int
    masked: bool = False
    steps: int = 50
    guidance: float = 7.5

    def tokens(self, prompts, length):
        check_clip_length(length, self.length)
        return self.tokenizer(prompts, length)

    def negative_tokens(self, negative, length):
        return self.tokens([negative or ""], length)

    def embed_length(self, length):
        return length

    def encode(self, params, ids_BL, mask_BL):
        seen = (mask_BL,) if self.masked else ()
        text_BLD = self.apply(params["text_encoder"], ids_BL, *seen).last
        return PromptEmbeds(text_BLD, jnp.ones_like(mask_BL))


@dataclass(frozen=True, eq=False)
class TwoClipPromptEncoder:
    """The last states but one of both, side by side, and the second one's pooled vector.

    zeros: whether the network was trained to be told zeros where there is no prompt
      (force_zeros_for_empty_prompt); tokens whose mask is zero throughout say so.
    """

    tokenizers: tuple[Tokenizer, Tokenizer]
    first: Callable
    second: Callable
    length: int
    zeros: bool
    steps: int = 50
    guidance: float = 5.0

    def tokens(self, prompts, length):
        check_clip_length(length, self.length)
        return concat_tokens(self.tokenizers, prompts, (length, length))

    def negative_tokens(self, negative, length):
        ids, mask = self.tokens([negative or ""], length)
        return ids, np.zeros_like(mask) if negative is None and self.zeros else mask

    def embed_length(self, length):
        return length

    def encode(self, params, ids_BL, mask_BL):
        one, two = jnp.split(ids_BL, 2, axis=1)
        first = self.first(params["text_encoder"], one)
        second = self.second(params["text_encoder_2"], two)
        text_BLD = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
        told_B = jnp.any(mask_BL > 0, axis=1).astype(text_BLD.dtype)
        mask = jnp.ones_like(mask_BL[:, : text_BLD.shape[1]])
        return PromptEmbeds(text_BLD * told_B[:, None, None], mask, second.pooled * told_B[:, None])


def prompts(parts: TextComponents, config: Config) -> ClipPromptEncoder | TwoClipPromptEncoder:
    """Two where the network is told a pooled vector."""
    told = config.addition_embed_type is not None
    if told != (parts.pipeline == SDXL):
        raise InputError(
            f"{parts.path}: found a {parts.pipeline} with addition_embed_type "
            f"{config.addition_embed_type} in unet/config.json; expected it of {SDXL} alone"
        )
    names = ["text_encoder", "text_encoder_2"][: 1 + told]
    parts.require(*names)
    specs = [parts.specs[name] for name in names]
    width = sum(spec.hidden_size for spec in specs)
    check_width(parts.path, width, config.cross_attention_dim, "cross_attention_dim")
    one = parts.tokenizer(learned=True)
    length = parts.clip_length(one, "text_encoder")
    if not told:
        return ClipPromptEncoder(one, parts.apply[names[0]], length, specs[0].use_attention_mask)
    two = parts.tokenizer("tokenizer_2", learned=True)
    if (other := parts.clip_length(two, "text_encoder_2")) != length:
        raise InputError(
            f"{parts.path / 'tokenizer_2'}, model_max_length: found {other}; expected {length}, as "
            "of the first tokenizer"
        )
    zeros = bool(parts.index.get("force_zeros_for_empty_prompt", True))
    return TwoClipPromptEncoder((one, two), *(parts.apply[name] for name in names), length, zeros)
