"""SANA's prompts: an instruction before the prompt, and Gemma's states of the prompt alone.

Xie et al., arXiv:2410.10629, section 3.1; diffusers' SanaPipeline, whose words the instruction is.
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

# What the networks were trained with, to the letter.
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
PLAIN = 2  # the mask of tokens that stand without it


@dataclass(frozen=True, eq=False)
class GemmaPromptEncoder:
    """tokenizer: takes texts as they are, since only the prompt is put in lower case."""

    tokenizer: Tokenizer
    apply: Callable
    length: int = 300
    steps: int = 20
    guidance: float = 4.5

    @cached_property
    def instruction(self) -> int:
        """Its tokens, the first of all texts among them."""
        return len(self.tokenizer.backend.encode(INSTRUCTION))

    def tokens(self, prompts, length):
        texts = [INSTRUCTION + text for text in preprocess(prompts)]
        return self.tokenizer(texts, self.instruction + length - 2)

    def negative_tokens(self, negative, length):
        """Without the instruction, which a mask of 2 says, and padded to as many tokens."""
        ids, mask = self.tokenizer(preprocess(negative or ""), length)
        room = ((0, 0), (0, self.instruction - 2))
        return np.pad(ids, room), np.pad(PLAIN * mask, room)

    def embed_length(self, length):
        return length

    def encode(self, params, ids_BL, mask_BL):
        text_BLD = self.apply(params["text_encoder"], ids_BL, jnp.minimum(mask_BL, 1))
        length = ids_BL.shape[1] - self.instruction + 2
        plain_B = jnp.any(mask_BL == PLAIN, axis=1)

        def read(x):
            """The first state, of the token that begins every text, and those of the prompt."""
            after = jnp.concatenate([x[:, :1], x[:, 1 - length :]], axis=1)
            return jnp.where(expand(plain_B, x), x[:, :length], after)

        return PromptEmbeds(read(text_BLD), jnp.minimum(read(mask_BL), 1))


def prompts(parts: TextComponents, config: Config) -> GemmaPromptEncoder:
    parts.require("text_encoder")
    width = parts.specs["text_encoder"].hidden_size
    check_width(parts.path, width, config.caption_channels, "caption_channels")
    sprint = parts.pipeline == "SanaSprintPipeline"
    if sprint != config.guidance_embeds:
        raise InputError(
            f"{parts.path}: found a {parts.pipeline} with guidance_embeds {config.guidance_embeds} "
            f"in transformer/config.json; expected {sprint}, as that pipeline tells its guidance"
        )
    return GemmaPromptEncoder(
        parts.tokenizer(), parts.apply["text_encoder"], steps=2 if sprint else 20
    )
