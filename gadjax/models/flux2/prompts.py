"""Prompt encoder of FLUX.2-klein: hidden states of Qwen3 after three of its blocks, side by side.

Follows diffusers' Flux2KleinPipeline. Only Qwen3 is given the attention mask: the network has none,
and the rows of the padding, which differ from prompt to prompt, take part.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.models.config import refuse
from gadjax.models.flux2.config import Config
from gadjax.models.text import chat
from gadjax.models.text.prompts import PromptEmbeds, TextComponents, check_width
from gadjax.models.zimage.prompts import ChatPromptEncoder

TEMPLATE = chat.QWEN3 + "<think>\n\n</think>\n\n"  # thinking is off
BLOCKS = 9, 18, 27


@dataclass(frozen=True, eq=False)
class KleinPromptEncoder(ChatPromptEncoder):
    """Prompt encoder with Qwen3; blocks: numbers of its blocks after which states are read."""

    blocks: tuple[int, ...] = BLOCKS
    guidance: float = 4.0

    def tokens(self, prompts, length):
        return self.tokenizer([TEMPLATE.format(prompt) for prompt in prompts], length)

    def encode(self, params, ids_BL, mask_BL):
        states = self.apply(params["text_encoder"], ids_BL, mask_BL, self.blocks)
        return PromptEmbeds(jnp.concatenate(states, axis=-1), jnp.ones_like(mask_BL))


def prompts(parts: TextComponents, config: Config) -> KleinPromptEncoder:
    parts.require("text_encoder")
    spec, tokenizer = parts.specs["text_encoder"], parts.tokenizer()
    width = len(BLOCKS) * spec.hidden_size
    check_width(parts.path, width, config.joint_attention_dim, "joint_attention_dim")
    chat.check_template(tokenizer, TEMPLATE, enable_thinking=False)
    if (side := tokenizer.backend.padding_side) != "right":
        # Padding in front attends to nothing: transformers' attentions differ in what it gets.
        refuse("tokenizer, padding_side", side, "'right'")
    if spec.num_hidden_layers <= BLOCKS[-1]:
        # After the last of just so many, transformers has the final norm's output in its place.
        raise InputError(
            f"{parts.path}: found a text encoder of {spec.num_hidden_layers} layers; expected more "
            f"than {BLOCKS[-1]}, after which the pipeline reads hidden states"
        )
    # A distilled network has no guidance in diffusers, whatever scale is asked for.
    guidance = 1.0 if parts.index.get("is_distilled") else 4.0
    return KleinPromptEncoder(tokenizer, parts.apply["text_encoder"], guidance=guidance)
