"""Prompt encoder of Z-Image: Qwen3's hidden states of a chat, before its last block.

Follows diffusers' ZImagePipeline.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.models.text import chat
from gadjax.models.text.prompts import PromptEmbeds, TextComponents, check_width
from gadjax.models.text.tokenizer import Tokenizer
from gadjax.models.zimage.config import Config


@dataclass(frozen=True, eq=False)
class ChatPromptEncoder:
    """Prompt encoder with Qwen3, which reads the prompt as the turn of a user.

    Attributes:
      tokenizer: of Qwen3.
      apply: function of Qwen3.
      blocks: number of its blocks after which hidden states are read, without its final norm.
      length: number of tokens, those of the template included.
      steps, guidance: sampling defaults of the pipeline in diffusers, whose guidance_scale s is
        s + 1 here: its guidance is cond + s (cond - null).
    """

    tokenizer: Tokenizer
    apply: Callable
    blocks: int
    length: int = 512
    steps: int = 50
    guidance: float = 6.0

    def tokens(self, prompts, length):
        return self.tokenizer([chat.QWEN3.format(prompt) for prompt in prompts], length)

    def negative_tokens(self, negative, length):
        return self.tokens([negative or ""], length)

    def embed_length(self, length):
        return length

    def encode(self, params, ids_BL, mask_BL):
        (text_BLD,) = self.apply(params["text_encoder"], ids_BL, mask_BL, (self.blocks,))
        # A prompt's tokens come first, on whichever side the tokenizer pads.
        order_BL = jnp.argsort(mask_BL == 0, axis=1, stable=True)
        text_BLD = jnp.take_along_axis(text_BLD, order_BL[..., None], axis=1)
        return PromptEmbeds(text_BLD, jnp.take_along_axis(mask_BL, order_BL, axis=1))


def prompts(parts: TextComponents, config: Config) -> ChatPromptEncoder:
    parts.require("text_encoder")
    spec, tokenizer = parts.specs["text_encoder"], parts.tokenizer()
    check_width(parts.path, spec.hidden_size, config.cap_feat_dim, "cap_feat_dim")
    chat.check_template(tokenizer, chat.QWEN3, enable_thinking=True)
    if spec.num_hidden_layers < 2:
        raise InputError(f"{parts.path}: found a text encoder of one layer; expected 2 or more")
    return ChatPromptEncoder(tokenizer, parts.apply["text_encoder"], spec.num_hidden_layers - 1)
