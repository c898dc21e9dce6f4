"""Prompt encoders: prompts -> token ids -> prompt embeddings.

The `prompts.py` of every family defines its own: which text encoders and tokenizers there are,
which of their hidden states the network gets, and what an empty prompt is. Token ids of several
encoders are concatenated, so that data carries one array of ids whatever the family.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from gadjax.errors import InputError
from gadjax.models.text.tokenizer import Tokenizer, load_tokenizer
from gadjax.types import Params

MAX_TOKENS = 1 << 32  # a larger model_max_length stands for no limit
Tokens = tuple[np.ndarray, np.ndarray]  # ids_BL, mask_BL (attention mask); int32


class PromptEmbeds(NamedTuple):
    """Prompt embeddings [B, L, D], attention mask [B, L] (1 = attend), pooled embedding [B, P].

    Families without a pooled embedding have None.
    """

    embeds: jax.Array
    mask: jax.Array
    pooled: jax.Array | None = None


class PromptEncoder(Protocol):
    """Prompt encoder of a family: tokenizers and text encoders.

    length, steps, guidance: tokens, sampling steps and guidance scale that the family's pipeline in
    diffusers has by default.
    """

    length: int
    steps: int
    guidance: float

    def tokens(self, prompts: Sequence[str], length: int) -> Tokens:
        """Token ids and attention mask of prompts. Raises: InputError for an unsupported length."""

    def negative_tokens(self, negative: str | None, length: int) -> Tokens:
        """Token ids and mask of the negative prompt [1, L]; None: the family's default."""

    def embed_length(self, length: int) -> int:
        """Length of the prompt embeddings of `tokens(prompts, length)`."""

    def encode(self, params: Mapping[str, Params], ids_BL, mask_BL) -> PromptEmbeds:
        """Prompt embeddings of token ids.

        Args:
          params: parameters of all text encoders, by name.
          ids_BL, mask_BL: from `tokens` or `negative_tokens`.
        """


@dataclass(frozen=True, eq=False)
class TextComponents:
    """Text encoders and tokenizers of a pipeline folder.

    Attributes:
      path: the folder.
      index: content of its model_index.json.
      apply, specs: apply function and Config of every network, by name.
    """

    path: Path
    index: Mapping[str, Any]
    apply: Mapping[str, Callable[..., Any]]
    specs: Mapping[str, Any]

    @property
    def pipeline(self) -> str:
        """Class name of the pipeline in diffusers."""
        return self.index["_class_name"]

    def require(self, *names: str) -> None:
        """Check that the folder has these networks. Raises: InputError for the first absent one."""
        for name in names:
            if name not in self.apply:
                raise InputError(f"{self.path}: found no {name}; expected the text encoder's files")

    def tokenizer(
        self, name: str = "tokenizer", *, clean: bool = False, textual_inversion: bool = False
    ) -> Tokenizer:
        """Load a tokenizer of the folder.

        Args:
          name: in model_index.json.
          clean: whether the family's pipeline lower-cases prompts.
          textual_inversion: whether the family's pipeline supports textual inversion.

        Raises: InputError if there is none, or its files are unusable.
        """
        match self.index.get(name):
            case [str(), str(kind)]:
                pass
            case _:
                raise InputError(f"{self.path}: found no {name}; expected the tokenizer's files")
        encoder = self.specs[name.replace("tokenizer", "text_encoder")]
        vocab_size = encoder.vocab_size
        return load_tokenizer(
            self.path / name,
            kind,
            clean=clean,
            vocab_size=vocab_size,
            textual_inversion=textual_inversion,
        )

    def clip_length(self, tokenizer: Tokenizer, *encoders: str) -> int:
        """Number of tokens that these CLIPs are given: the tokenizer's model_max_length.

        Raises: InputError if there is none, or a CLIP has fewer positions.
        """
        length = tokenizer.backend.model_max_length
        most = min(self.specs[name].max_position_embeddings for name in encoders)
        if type(length) is not int or not 1 <= length <= most:
            given = length if length < MAX_TOKENS else "none"
            raise InputError(
                f"{tokenizer.backend.name_or_path}, model_max_length: found {given}; expected a "
                f"number from 1 to {most}, the positions of {' and '.join(encoders)}"
            )
        return length


def check_width(path: Path, width: int, expected: int, option: str) -> None:
    """Check that the text encoders' width is the network's.

    Args:
      path: the pipeline folder.
      width: of the text encoders' hidden states.
      expected: the width that the network takes.
      option: name of that width in the network's configuration.

    Raises: InputError if they differ.
    """
    if width != expected:
        raise InputError(
            f"{path}: found text encoders of width {width}; expected {expected}, the network's "
            f"{option}"
        )


def concat_tokens(
    tokenizers: Sequence[Tokenizer], prompts: Sequence[str], lengths: Sequence[int]
) -> Tokens:
    """Tokenize prompts for several encoders and concatenate along the length.

    Args:
      tokenizers: one for each encoder.
      prompts: B texts.
      lengths: number of tokens of each encoder.

    Returns: ids and mask [B, sum of lengths].
    """
    pairs = [t(prompts, n) for t, n in zip(tokenizers, lengths, strict=True)]
    ids, masks = zip(*pairs, strict=True)
    return np.concatenate(ids, axis=1), np.concatenate(masks, axis=1)


def check_clip_length(length: int, expected: int) -> None:
    """Check the number of tokens. Raises: InputError for another than CLIP was trained with."""
    if length != expected:
        raise InputError(f"length: found {length} tokens; expected {expected}, as CLIP takes them")
