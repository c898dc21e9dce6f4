"""How the prompts of a pipeline become what its network is told.

Every family says it in its own `prompts.py`: which text encoders and tokenizers there are, which
of their states is read, and what an empty prompt is. Where there are several encoders their tokens
stand side by side, so that data carries one array of ids whatever the family.
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

LARGEST = 1 << 32
Tokens = tuple[np.ndarray, np.ndarray]  # ids_BL, mask_BL, int32


class PromptEmbeds(NamedTuple):
    """text_BLD, mask_BL (1 = read), and the vector pooled_BP of families that have one."""

    text: jax.Array
    mask: jax.Array
    pooled: jax.Array | None = None


class PromptEncoder(Protocol):
    """length, steps, guidance: what the family's pipeline in diffusers draws with by default."""

    length: int
    steps: int
    guidance: float

    def tokens(self, prompts: Sequence[str], length: int) -> Tokens:
        """Of prompts. Raises: InputError for a length that the family cannot take."""

    def negative_tokens(self, negative: str | None, length: int) -> Tokens:
        """[1, L] of what guidance leads away from; None for what the family takes by default."""

    def embed_length(self, length: int) -> int:
        """The length of text_BLD."""

    def encode(self, params: Mapping[str, Params], ids_BL, mask_BL) -> PromptEmbeds:
        """params: by network, of all text encoders."""


@dataclass(frozen=True, eq=False)
class TextComponents:
    """The text side of a pipeline folder. index: model_index.json. apply, specs: by network."""

    path: Path
    index: Mapping[str, Any]
    apply: Mapping[str, Callable[..., Any]]
    specs: Mapping[str, Any]

    @property
    def pipeline(self) -> str:
        """The class of the pipeline in diffusers."""
        return self.index["_class_name"]

    def require(self, *names: str) -> None:
        """Raises: InputError unless there are networks of these names."""
        for name in names:
            if name not in self.apply:
                raise InputError(f"{self.path}: found no {name}; expected the text encoder's files")

    def tokenizer(
        self, name: str = "tokenizer", *, clean: bool = False, learned: bool = False
    ) -> Tokenizer:
        """clean: whether the family's pipeline puts prompts in lower case. learned: whether it
        knows learned concepts."""
        match self.index.get(name):
            case [str(), str(kind)]:
                pass
            case _:
                raise InputError(f"{self.path}: found no {name}; expected the tokenizer's files")
        encoder = self.specs[name.replace("tokenizer", "text_encoder")]
        known = encoder.vocab_size
        return load_tokenizer(self.path / name, kind, clean=clean, known=known, learned=learned)

    def clip_length(self, tokenizer: Tokenizer, *encoders: str) -> int:
        """How many tokens these CLIPs are given: as many as the tokenizer's files say.

        Raises: InputError where a CLIP has fewer positions.
        """
        length = tokenizer.backend.model_max_length
        most = min(self.specs[name].max_position_embeddings for name in encoders)
        if type(length) is not int or not 1 <= length <= most:
            found = length if length < LARGEST else "none"  # transformers' number for none
            raise InputError(
                f"{tokenizer.backend.name_or_path}, model_max_length: found {found}; expected a "
                f"number from 1 to {most}, the positions of {' and '.join(encoders)}"
            )
        return length


def check_width(path: Path, found: int, expected: int, what: str) -> None:
    """Raises: InputError where text encoders do not give what the network takes."""
    if found != expected:
        raise InputError(
            f"{path}: found text encoders of width {found}; expected {expected}, the network's "
            f"{what}"
        )


def concat_tokens(
    tokenizers: Sequence[Tokenizer], prompts: Sequence[str], lengths: Sequence[int]
) -> Tokens:
    """The tokens of several encoders as one array."""
    pairs = [t(prompts, n) for t, n in zip(tokenizers, lengths, strict=True)]
    ids, masks = zip(*pairs, strict=True)
    return np.concatenate(ids, axis=1), np.concatenate(masks, axis=1)


def check_clip_length(length: int, expected: int) -> None:
    """Raises: InputError for another number of tokens than CLIP was trained with."""
    if length != expected:
        raise InputError(f"length: found {length} tokens; expected {expected}, as CLIP takes them")
