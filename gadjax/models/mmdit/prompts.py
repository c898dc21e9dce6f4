"""Prompt encoder of SD3: two CLIPs along the width, then T5 along the length.

Follows diffusers' StableDiffusion3Pipeline. No encoder is given the attention mask, and the network
has none: it is all ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from gadjax.models.mmdit.config import Config
from gadjax.models.text.prompts import PromptEmbeds, TextComponents, check_width, concat_tokens
from gadjax.models.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class SD3PromptEncoder:
    """Prompt encoder with two CLIPs and, where the pipeline has it, T5.

    Attributes:
      tokenizers: of the CLIPs, and of T5 if it is there.
      clips: apply functions of the CLIPs.
      t5: apply function; None if the pipeline goes without it: its embeddings are then zeros.
      clip_length: number of tokens of either CLIP.
      width: of the prompt embeddings.
      length: number of tokens of T5.
      steps, guidance: sampling defaults of the pipeline in diffusers.
    """

    tokenizers: tuple[Tokenizer, ...]
    clips: tuple[Callable, Callable]
    t5: Callable | None
    clip_length: int
    width: int
    length: int = 256
    steps: int = 28
    guidance: float = 7.0

    def tokens(self, prompts, length):
        lengths = (self.clip_length, self.clip_length, length)
        ids, mask = concat_tokens(self.tokenizers, prompts, lengths[: len(self.tokenizers)])
        padding = ((0, 0), (0, sum(lengths) - ids.shape[1]))
        return np.pad(ids, padding), np.pad(mask, padding)

    def negative_tokens(self, negative, length):
        return self.tokens([negative or ""], length)

    def embed_length(self, length):
        return self.clip_length + length

    def encode(self, params, ids_BL, mask_BL):
        ends = self.clip_length, 2 * self.clip_length
        one, two, three = jnp.split(ids_BL, ends, axis=1)
        first = self.clips[0](params["text_encoder"], one)
        second = self.clips[1](params["text_encoder_2"], two)
        text_BLD = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
        missing = self.width - text_BLD.shape[-1]
        text_BLD = jnp.pad(text_BLD, ((0, 0), (0, 0), (0, missing)))
        if self.t5 is None:
            t5_BLD = jnp.zeros((*three.shape, self.width))
        else:
            t5_BLD = self.t5(params["text_encoder_3"], three, jnp.ones_like(three))
        text_BLD = jnp.concatenate([text_BLD, t5_BLD.astype(text_BLD.dtype)], axis=1)
        pooled = jnp.concatenate([first.pooled, second.pooled], axis=-1)
        return PromptEmbeds(text_BLD, jnp.ones(text_BLD.shape[:2], mask_BL.dtype), pooled)


def prompts(parts: TextComponents, config: Config) -> SD3PromptEncoder:
    parts.require("text_encoder", "text_encoder_2")
    specs = [parts.specs[name] for name in ("text_encoder", "text_encoder_2")]
    names = ["tokenizer", "tokenizer_2"]
    t5 = parts.apply.get("text_encoder_3")
    if t5 is not None:
        names.append("tokenizer_3")
        width = parts.specs["text_encoder_3"].d_model
        check_width(parts.path, width, config.joint_attention_dim, "joint_attention_dim")
    pooled = sum(spec.projection_dim for spec in specs)
    check_width(parts.path, pooled, config.pooled_projection_dim, "pooled_projection_dim")
    tokenizers = tuple(parts.tokenizer(name) for name in names)
    return SD3PromptEncoder(
        tokenizers,
        tuple(parts.apply[name] for name in ("text_encoder", "text_encoder_2")),
        t5,
        parts.clip_length(tokenizers[0], "text_encoder", "text_encoder_2"),
        config.joint_attention_dim,
    )
