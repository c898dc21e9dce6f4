"""Prompt encoder of Lumina 2: Gemma's hidden states before its last block, after a system prompt.

Follows diffusers' Lumina2Pipeline, whose system prompt this is.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gadjax.errors import InputError
from gadjax.models.lumina2.config import Config
from gadjax.models.text.prompts import PromptEmbeds, TextComponents, check_width
from gadjax.models.text.tokenizer import Tokenizer

SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts. <Prompt Start> "
)


@dataclass(frozen=True, eq=False)
class SystemPromptEncoder:
    """Prompt encoder with Gemma, which reads a system prompt before the prompt.

    Attributes:
      tokenizer: of Gemma.
      apply: function of Gemma.
      blocks: number of its blocks after which hidden states are read, without its final norm.
      length: number of tokens, those of the system prompt included.
      steps, guidance: sampling defaults of the pipeline in diffusers.
    """

    tokenizer: Tokenizer
    apply: Callable
    blocks: int
    length: int = 256
    steps: int = 30
    guidance: float = 4.0

    def tokens(self, prompts, length):
        return self.tokenizer([SYSTEM + prompt for prompt in prompts], length)

    def negative_tokens(self, negative, length):
        """Tokens without the system prompt."""
        return self.tokenizer([negative or ""], length)

    def embed_length(self, length):
        return length

    def encode(self, params, ids_BL, mask_BL):
        (text_BLD,) = self.apply(params["text_encoder"], ids_BL, mask_BL, (self.blocks,))
        return PromptEmbeds(text_BLD, mask_BL)


def prompts(parts: TextComponents, config: Config) -> SystemPromptEncoder:
    parts.require("text_encoder")
    spec = parts.specs["text_encoder"]
    check_width(parts.path, spec.hidden_size, config.cap_feat_dim, "cap_feat_dim")
    if spec.num_hidden_layers < 2:
        raise InputError(f"{parts.path}: found a text encoder of one layer; expected 2 or more")
    return SystemPromptEncoder(
        parts.tokenizer(), parts.apply["text_encoder"], spec.num_hidden_layers - 1
    )
