"""Prompt encoder of FLUX.1: T5's hidden states, and CLIP's pooled vector.

Follows diffusers' FluxPipeline. Neither encoder is given the attention mask, and the network has
none: padding takes part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from gadjax.models.flux.config import Config
from gadjax.models.text.prompts import PromptEmbeds, TextComponents, check_width, concat_tokens
from gadjax.models.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class FluxPromptEncoder:
    """Prompt encoder with CLIP and T5.

    Attributes:
      tokenizers: of CLIP and of T5.
      clip, t5: apply functions.
      clip_length: number of CLIP's tokens.
      length: number of T5's tokens; FLUX.1-schnell was trained with 256 of them.
      steps, guidance: sampling defaults of the pipeline in diffusers; a network without an
        embedding of the scale has no guidance there.
    """

    tokenizers: tuple[Tokenizer, Tokenizer]
    clip: Callable
    t5: Callable
    clip_length: int
    length: int = 512
    steps: int = 28
    guidance: float = 3.5

    def tokens(self, prompts, length):
        return concat_tokens(self.tokenizers, prompts, (self.clip_length, length))

    def negative_tokens(self, negative, length):
        return self.tokens([negative or ""], length)

    def embed_length(self, length):
        return length

    def encode(self, params, ids_BL, mask_BL):
        clip_ids, t5_ids = jnp.split(ids_BL, (self.clip_length,), axis=1)
        pooled = self.clip(params["text_encoder"], clip_ids).pooled
        text_BLD = self.t5(params["text_encoder_2"], t5_ids, jnp.ones_like(t5_ids))
        return PromptEmbeds(text_BLD, jnp.ones(text_BLD.shape[:2], np.int32), pooled)


def prompts(parts: TextComponents, config: Config) -> FluxPromptEncoder:
    parts.require("text_encoder", "text_encoder_2")
    clip, t5 = (parts.specs[name] for name in ("text_encoder", "text_encoder_2"))
    check_width(parts.path, t5.d_model, config.joint_attention_dim, "joint_attention_dim")
    check_width(parts.path, clip.hidden_size, config.pooled_projection_dim, "pooled_projection_dim")
    names = "tokenizer", "tokenizer_2"
    tokenizers = tuple(parts.tokenizer(name, textual_inversion=True) for name in names)
    return FluxPromptEncoder(
        tokenizers,
        parts.apply["text_encoder"],
        parts.apply["text_encoder_2"],
        parts.clip_length(tokenizers[0], "text_encoder"),
        guidance=3.5 if config.guidance_embeds else 1.0,
    )
