"""Prompt encoder of SANA: Gemma's hidden states of the prompt, read after an instruction.

Xie et al., arXiv:2410.10629, section 3.1; diffusers' SanaPipeline, whose instruction this is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from gadjax.errors import InputError
from gadjax.models.sana.net import Config
from gadjax.models.text.prompts import PromptEmbeds, TextComponents, check_width
from gadjax.models.text.tokenizer import Tokenizer, preprocess
from gadjax.types import expand

# Complex human instruction: verbatim what the networks were trained with.
INSTRUCTION = """\
Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions \
suitable for image generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and \
spatial relationships to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without \
overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, \
sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring \
glowing street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus \
passing by towering glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any \
additional commentary or evaluations:
User Prompt: """
NO_INSTRUCTION = 2  # mask of the tokens of a prompt without instruction


@dataclass(frozen=True, eq=False)
class GemmaPromptEncoder:
    """Prompt encoder with Gemma, which reads an instruction before the prompt.

    tokenizer: without preprocessing, since the prompt alone is lower-cased.
    """

    tokenizer: Tokenizer
    apply: Callable
    length: int = 300
    steps: int = 20
    guidance: float = 4.5

    @cached_property
    def instruction_length(self) -> int:
        """Number of the instruction's tokens, including the one that begins every text."""
        return len(self.tokenizer.backend.encode(INSTRUCTION))

    def tokens(self, prompts, length):
        texts = [INSTRUCTION + text for text in preprocess(prompts)]
        return self.tokenizer(texts, self.instruction_length + length - 2)

    def negative_tokens(self, negative, length):
        """Tokens without the instruction, marked by a mask of 2, padded to the same length."""
        ids, mask = self.tokenizer(preprocess(negative or ""), length)
        padding = ((0, 0), (0, self.instruction_length - 2))
        return np.pad(ids, padding), np.pad(NO_INSTRUCTION * mask, padding)

    def embed_length(self, length):
        return length

    def encode(self, params, ids_BL, mask_BL):
        text_BLD = self.apply(params["text_encoder"], ids_BL, jnp.minimum(mask_BL, 1))
        length = ids_BL.shape[1] - self.instruction_length + 2
        plain_B = jnp.any(mask_BL == NO_INSTRUCTION, axis=1)

        def select(x):
            """Positions of the prompt, and the first, of the token that begins every text."""
            after = jnp.concatenate([x[:, :1], x[:, 1 - length :]], axis=1)
            return jnp.where(expand(plain_B, x), x[:, :length], after)

        return PromptEmbeds(select(text_BLD), jnp.minimum(select(mask_BL), 1))


def prompts(parts: TextComponents, config: Config) -> GemmaPromptEncoder:
    parts.require("text_encoder")
    width = parts.specs["text_encoder"].hidden_size
    check_width(parts.path, width, config.caption_channels, "caption_channels")
    sprint = parts.pipeline == "SanaSprintPipeline"
    if sprint != config.guidance_embeds:
        raise InputError(
            f"{parts.path}: found a {parts.pipeline} with guidance_embeds {config.guidance_embeds} "
            f"in transformer/config.json; expected {sprint}, as that pipeline requires"
        )
    return GemmaPromptEncoder(
        parts.tokenizer(), parts.apply["text_encoder"], steps=2 if sprint else 20
    )
