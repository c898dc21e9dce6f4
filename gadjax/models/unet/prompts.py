"""Prompt encoders of Stable Diffusion 1.x and 2.x (one CLIP) and of SDXL (two).

Follows diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline. The network attends to the
padding too, so that the attention mask of the prompt embeddings is all ones.
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
    """Prompt encoder with one CLIP: its last hidden states.

    use_attention_mask: whether CLIP itself ignores padding.
    """

    tokenizer: Tokenizer
    apply: Callable
    length: int
    use_attention_mask: bool = False
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
        mask = (mask_BL,) if self.use_attention_mask else ()
        text_BLD = self.apply(params["text_encoder"], ids_BL, *mask).last
        return PromptEmbeds(text_BLD, jnp.ones_like(mask_BL))


@dataclass(frozen=True, eq=False)
class TwoClipPromptEncoder:
    """Prompt encoder with two CLIPs: their penultimate hidden states, concatenated along the width.

    The pooled embedding is the second CLIP's.

    Attributes:
      tokenizers: of the two CLIPs.
      first, second: apply functions of the CLIPs.
      length: number of tokens of either.
      force_zeros: whether the network was trained with zeros where there is no prompt
        (force_zeros_for_empty_prompt); an attention mask of zeros throughout marks such tokens.
      steps, guidance: sampling defaults of the pipeline in diffusers.
    """

    tokenizers: tuple[Tokenizer, Tokenizer]
    first: Callable
    second: Callable
    length: int
    force_zeros: bool
    steps: int = 50
    guidance: float = 5.0

    def tokens(self, prompts, length):
        check_clip_length(length, self.length)
        return concat_tokens(self.tokenizers, prompts, (length, length))

    def negative_tokens(self, negative, length):
        ids, mask = self.tokens([negative or ""], length)
        return ids, np.zeros_like(mask) if negative is None and self.force_zeros else mask

    def embed_length(self, length):
        return length

    def encode(self, params, ids_BL, mask_BL):
        one, two = jnp.split(ids_BL, 2, axis=1)
        first = self.first(params["text_encoder"], one)
        second = self.second(params["text_encoder_2"], two)
        text_BLD = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
        keep_B = jnp.any(mask_BL > 0, axis=1).astype(text_BLD.dtype)
        mask = jnp.ones_like(mask_BL[:, : text_BLD.shape[1]])
        return PromptEmbeds(text_BLD * keep_B[:, None, None], mask, second.pooled * keep_B[:, None])


def prompts(parts: TextComponents, config: Config) -> ClipPromptEncoder | TwoClipPromptEncoder:
    """Prompt encoder of a U-Net's pipeline: with two CLIPs if it takes a pooled embedding.

    Raises: InputError for networks, tokenizers or a pipeline that do not go together.
    """
    pooled = config.addition_embed_type is not None
    if pooled != (parts.pipeline == SDXL):
        raise InputError(
            f"{parts.path}: found a {parts.pipeline} with addition_embed_type "
            f"{config.addition_embed_type} in unet/config.json; expected it of {SDXL} alone"
        )
    names = ["text_encoder", "text_encoder_2"][: 1 + pooled]
    parts.require(*names)
    specs = [parts.specs[name] for name in names]
    width = sum(spec.hidden_size for spec in specs)
    check_width(parts.path, width, config.cross_attention_dim, "cross_attention_dim")
    one = parts.tokenizer(textual_inversion=True)
    length = parts.clip_length(one, "text_encoder")
    if not pooled:
        return ClipPromptEncoder(one, parts.apply[names[0]], length, specs[0].use_attention_mask)
    two = parts.tokenizer("tokenizer_2", textual_inversion=True)
    if (other := parts.clip_length(two, "text_encoder_2")) != length:
        raise InputError(
            f"{parts.path / 'tokenizer_2'}, model_max_length: found {other}; expected {length}, as "
            "of the first tokenizer"
        )
    force_zeros = bool(parts.index.get("force_zeros_for_empty_prompt", True))
    return TwoClipPromptEncoder(
        (one, two), *(parts.apply[name] for name in names), length, force_zeros
    )
