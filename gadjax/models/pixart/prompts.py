"""Prompt encoder of PixArt: T5's last hidden states and attention mask (PixArtAlphaPipeline)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from gadjax.models.pixart.net import Config
from gadjax.models.text.prompts import PromptEmbeds, TextComponents, check_width
from gadjax.models.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class T5PromptEncoder:
    """Prompt encoder with T5, of prompts in lower case. length: 300 in PixArt-Sigma's pipeline."""

    tokenizer: Tokenizer
    apply: Callable
    length: int = 120
    steps: int = 20
    guidance: float = 4.5

    def tokens(self, prompts, length):
        return self.tokenizer(prompts, length)

    def negative_tokens(self, negative, length):
        return self.tokenizer([negative or ""], length)

    def embed_length(self, length):
        return length

    def encode(self, params, ids_BL, mask_BL):
        return PromptEmbeds(self.apply(params["text_encoder"], ids_BL, mask_BL), mask_BL)


def prompts(parts: TextComponents, config: Config) -> T5PromptEncoder:
    parts.require("text_encoder")
    width = parts.specs["text_encoder"].d_model
    check_width(parts.path, width, config.caption_channels, "caption_channels")
    prompts = T5PromptEncoder(parts.tokenizer(clean=True), parts.apply["text_encoder"])
    return replace(prompts, length=300) if parts.pipeline == "PixArtSigmaPipeline" else prompts
