"""Qwen3 as a text encoder (transformers' Qwen3Model): ids and mask -> hidden states.

Qwen Team, arXiv:2505.09388. Shapes as in `causal`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gadjax.models.family import TextEncoder
from gadjax.models.ignored import IGNORED_TENSORS
from gadjax.models.keymap import KeyMap
from gadjax.models.module import Keys, stack
from gadjax.models.text.causal import (
    FeedForward,
    GroupedAttention,
    hidden_states,
    read_options,
)

# The second is the first with a head; its files differ in the prefix of their keys.
CLASS_NAMES = ("Qwen3Model", "Qwen3ForCausalLM")

# Options with the values that are supported.
FIXED = {
    "model_type": ("qwen3",),
    "architectures": tuple([name] for name in CLASS_NAMES),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
}


@dataclass(frozen=True)
class Config:
    """Options of transformers' Qwen3Config that change the encoder's output; same defaults."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> "Config":
        """Read a config.json. Raises: InputError naming the key that is unsupported."""
        return read_options(cls, cfg, CLASS_NAMES[0], FIXED, {"full_attention"})


def _norm(width: int, c: Config, dtype, rngs: Keys) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=c.rms_norm_eps, dtype=dtype, rngs=rngs)


class Attention(GroupedAttention):
    """Grouped-query attention, with an RMS norm of every head's queries and keys."""

    def __init__(self, c: Config, dtype, rngs: Keys):
        super().__init__(c, dtype, rngs)
        self.q_norm = _norm(c.head_dim, c, dtype, rngs)
        self.k_norm = _norm(c.head_dim, c, dtype, rngs)

    def normed(self, q_BLNH, k_BLKH):
        return self.q_norm(q_BLNH), self.k_norm(k_BLKH)


class Block(nnx.Module):
    """Block with a norm before either branch."""

    def __init__(self, c: Config, dtype, rngs: Keys):
        self.input_layernorm = _norm(c.hidden_size, c, dtype, rngs)
        self.self_attn = Attention(c, dtype, rngs)
        self.post_attention_layernorm = _norm(c.hidden_size, c, dtype, rngs)
        self.mlp = FeedForward(c, jax.nn.silu, dtype, rngs)

    def __call__(self, x_BLD, angles_LR, attended_B11QS):
        normed = self.input_layernorm(x_BLD)
        x_BLD = x_BLD + self.self_attn(normed, angles_LR, attended_B11QS)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class Encoder(nnx.Module):
    """Qwen3 encoder: `net(ids_BL int32, mask_BL, after=()) -> hidden states`, causal.

    See `hidden_states`. An id outside the vocabulary gives NaN.
    """

    def __init__(self, config: Config, dtype, remat: bool, rngs: Keys):
        c = config
        self.config, self.remat = config, remat
        init = nnx.initializers.normal(0.02)
        self.embed_tokens = nnx.Embed(
            c.vocab_size, c.hidden_size, embedding_init=init, dtype=dtype, rngs=rngs
        )
        self.blocks = stack(lambda r: Block(c, dtype, r), c.num_hidden_layers, rngs)
        self.norm = _norm(c.hidden_size, c, dtype, rngs)

    def __call__(self, ids_BL: jax.Array, mask_BL: jax.Array, after: Sequence[int] = ()):
        return hidden_states(self, self.embed_tokens(ids_BL), mask_BL, after)


def build(config: Config, *, dtype=jnp.float32, remat: bool = True) -> Callable[[Keys], nnx.Module]:
    """Constructor of the encoder, called with Keys.

    Args:
      config: the network's options.
      dtype: of the computation; parameters are initialised in float32.
      remat: rematerialisation of every block, see `checkpointed`.
    """
    return lambda rngs: Encoder(config, dtype, remat, rngs)


FAMILY = TextEncoder(
    class_names=CLASS_NAMES,
    config=Config,
    build=build,
    keymap=KeyMap(
        renames=((r"^blocks/", "layers/#/"),),
        ignored=tuple(IGNORED_TENSORS["Qwen3ForCausalLM"]),
        aliases=((r"^model\.", ""),),
    ),
    rules=(
        (r"^embed_tokens/embedding$", P("tensor", "fsdp")),
        (r"^blocks/.*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel$", P(None, "fsdp", "tensor")),
        (r"^blocks/.*/(o_proj|down_proj)/kernel$", P(None, "tensor", "fsdp")),
        (r"^blocks/\w+layernorm/scale$", P(None, "fsdp")),
        (r"^blocks/self_attn/[qk]_norm/scale$", P()),
        (r"^norm/scale$", P("fsdp")),
    ),
)
