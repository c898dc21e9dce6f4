"""SigLIP's text encoder (the text tower of transformers' SiglipModel), of SigLIP 2 too.

Zhai et al., arXiv:2303.15343; SigLIP 2: Tschannen et al., arXiv:2502.14786. CLIP's blocks, but
every token attends to all L, padding too, and the vector is that of the last one. B batch, L
tokens, D width, P width of the vector.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.errors import InputError
from gadjax.models import layers
from gadjax.models.config import POSITIVE_INTEGER, POSITIVE_NUMBER, is_positive, refuse
from gadjax.models.keymap import KeyMap
from gadjax.models.module import Keys, scan_blocks, stack
from gadjax.models.text.clip import ACTIVATIONS as CLIP_ACTIVATIONS
from gadjax.models.text.clip import Block, Embeddings, layer_norm

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = CLIP_ACTIVATIONS | {
    "gelu_pytorch_tanh": layers.gelu_tanh
}
KEYMAP = KeyMap(
    renames=((r"^blocks/", "encoder/layers/#/"), (r"^", "text_model/")),
    ignored=(r"^vision_model\.", r"^logit_(scale|bias)$", r"embeddings\.position_ids$"),
)


@dataclass(frozen=True)
class Config:
    """Options of transformers' SiglipTextConfig that change the encoder's output; same defaults.

    projection_size: P; None for D.
    """

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    projection_size: int | None = None

    @property
    def width(self) -> int:
        """Width P of the vector."""
        return self.projection_size or self.hidden_size

    @property
    def activation(self) -> Callable[[jax.Array], jax.Array]:
        return ACTIVATIONS[self.hidden_act]

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> "Config":
        """Read the text_config of a config.json. Raises: InputError naming the key."""
        values = {f.name: cfg[f.name] for f in fields(cls) if f.name in cfg}
        for key, value in values.items():
            if key == "hidden_act":
                valid, expected = value in ACTIVATIONS, " or ".join(ACTIVATIONS)
            elif key == "layer_norm_eps":
                valid, expected = is_positive(value, float), POSITIVE_NUMBER
            else:
                unset = key == "projection_size" and value is None
                valid, expected = unset or is_positive(value, int), POSITIVE_INTEGER
            if not valid:
                refuse(key, value, expected)
        config = cls(**values)
        if config.hidden_size % config.num_attention_heads:
            refuse(
                "num_attention_heads",
                config.num_attention_heads,
                f"a divisor of hidden_size {config.hidden_size}",
            )
        return config


class TextModel(nnx.Module):
    """SigLIP text encoder: `net(ids_BL int32) -> vectors [B, P]`, without dropout.

    Raises: InputError for a sequence longer than the table of positions.
    """

    def __init__(self, config: Config, dtype, rngs: Keys):
        c = config
        self.config = c
        self.embeddings = Embeddings(c, dtype, rngs)
        self.blocks = stack(lambda r: Block(c, dtype, r), c.num_hidden_layers, rngs)
        self.final_layer_norm = layer_norm(c, dtype, rngs)
        self.head = layers.Linear(c.hidden_size, c.width, dtype=dtype, rngs=rngs)

    def __call__(self, ids_BL: jax.Array) -> jax.Array:
        length, most = ids_BL.shape[1], self.config.max_position_embeddings
        if length > most:
            raise InputError(f"ids: found {length} tokens; expected at most {most}")
        h_BLD = self.embeddings(ids_BL)
        h_BLD = scan_blocks(self.blocks, h_BLD, lambda block, x: block(x, None, True), False)
        return self.head(self.final_layer_norm(h_BLD[:, -1]))


def build(config: Config, *, dtype=jnp.float32) -> Callable[[Keys], nnx.Module]:
    """Constructor of the encoder, called with Keys.

    Args:
      config: the network's options.
      dtype: of the computation; parameters are initialised in float32.
    """
    return lambda rngs: TextModel(config, dtype, rngs)
