"""The prompts of Stable Diffusion 1.x and 2.x (one CLIP) and of SDXL (two).

Follows diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline. CLIP reads its padding
too, so that the mask says nothing to the network; it is all ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from gadjax.models.text.prompts import TextParts, Told, check_clip_length, check_width, side_by_side
from gadjax.models.text.tokenizer import Tokenizer
from gadjax.models.unet.config import Config


@dataclass(frozen=True, eq=False)
class ClipPrompts:
    """CLIP's last states."""

    tokenizer: Tokenizer
    apply: Callable
    length: int
    steps: int = 50
    guidance: float = 7.5

    def tokens(self, prompts, length):
        check_clip_length(length, self.length)
        return self.tokenizer(prompts, length)

    def untold(self, negative, length):
        return self.tokens([negative or ""], length)

    def rows(self, length):
        return length

    def encode(self, params, ids_BL, mask_BL):
        text_BLD = self.apply(params["text_encoder"], ids_BL).last
        return Told(text_BLD, jnp.ones_like(mask_BL))


@dataclass(frozen=True, eq=False)
class TwoClipPrompts:
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
        return side_by_side(self.tokenizers, prompts, (length, length))

    def untold(self, negative, length):
        ids, mask = self.tokens([negative or ""], length)
        return ids, np.zeros_like(mask) if negative is None and self.zeros else mask

    def rows(self, length):
        return length

    def encode(self, params, ids_BL, mask_BL):
        one, two = jnp.split(ids_BL, 2, axis=1)
        first = self.first(params["text_encoder"], one)
        second = self.second(params["text_encoder_2"], two)
        text_BLD = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
        told_B = jnp.any(mask_BL > 0, axis=1).astype(text_BLD.dtype)
        mask = jnp.ones_like(mask_BL[:, : text_BLD.shape[1]])
        return Told(text_BLD * told_B[:, None, None], mask, second.pooled * told_B[:, None])


def prompts(parts: TextParts, config: Config) -> ClipPrompts | TwoClipPrompts:
    """Two where the network is told a pooled vector."""
    names = ["text_encoder"]
    if config.addition_embed_type is not None:
        names.append("text_encoder_2")
    parts.need(*names)
    specs = [parts.specs[name] for name in names]
    width = sum(spec.hidden_size for spec in specs)
    check_width(parts.path, width, config.cross_attention_dim, "cross_attention_dim")
    length = min(spec.max_position_embeddings for spec in specs)
    if len(names) == 1:
        return ClipPrompts(parts.tokenizer(), parts.apply["text_encoder"], length)
    tokenizers = parts.tokenizer(), parts.tokenizer("tokenizer_2")
    zeros = bool(parts.index.get("force_zeros_for_empty_prompt", True))
    return TwoClipPrompts(tokenizers, *(parts.apply[name] for name in names), length, zeros)
