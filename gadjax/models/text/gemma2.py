"""Gemma 2 as a text encoder (transformers' Gemma2Model): ids and mask -> last hidden state.

Gemma Team, arXiv:2408.00118. Shapes as in `causal`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gadjax.errors import InputError
from gadjax.models.family import TextEncoder
from gadjax.models.keymap import KeyMap
from gadjax.models.layers import gelu_tanh
from gadjax.models.module import Keys, stack
from gadjax.models.text.causal import (
    FeedForward,
    GroupedAttention,
    hidden_states,
    read_options,
)

CLASS_NAMES = ("Gemma2Model",)

# Options with the values that are supported.
FIXED = {
    "model_type": ("gemma2",),
    "architectures": (list(CLASS_NAMES),),
    "hidden_act": ("gelu_pytorch_tanh",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
    "rope_scaling": (None,),
}
# Both attend to all earlier tokens in a sequence that fits into the window.
LAYER_TYPES = {"sliding_attention", "full_attention"}


@dataclass(frozen=True)
class Config:
    """Options of transformers' Gemma2Config that change the encoder's output; same defaults."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    sliding_window: int = 4096
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float = 50.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> "Config":
        """Read a config.json. Raises: InputError naming the key that is unsupported."""
        return read_options(cls, cfg, CLASS_NAMES[0], FIXED, LAYER_TYPES)


class RMSNorm(nnx.Module):
    """RMS norm: x / rms(x) * (1 + scale), computed in at least float32."""

    def __init__(self, c: Config):
        self.scale = nnx.Param(jnp.zeros(c.hidden_size))
        self.eps = c.rms_norm_eps

    def __call__(self, x_BLD):
        wide = x_BLD.astype(jnp.promote_types(x_BLD.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (normed * (1 + self.scale[...].astype(wide.dtype))).astype(x_BLD.dtype)


class Attention(GroupedAttention):
    """Grouped-query attention with soft-capped logits."""

    def scaled(self, logits_BKGQS):
        cap = self.config.attn_logit_softcapping
        return cap * jnp.tanh(logits_BKGQS * (self.config.query_pre_attn_scalar**-0.5 / cap))


class Block(nnx.Module):
    """Block with norms before and after both branches, the latter ahead of the residual sum."""

    def __init__(self, c: Config, dtype, rngs: Keys):
        self.input_layernorm = RMSNorm(c)
        self.self_attn = Attention(c, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(c)
        self.pre_feedforward_layernorm = RMSNorm(c)
        self.mlp = FeedForward(c, gelu_tanh, dtype, rngs)
        self.post_feedforward_layernorm = RMSNorm(c)

    def __call__(self, x_BLD, angles_LR, attended_B11QS):
        out = self.self_attn(self.input_layernorm(x_BLD), angles_LR, attended_B11QS)
        x_BLD = x_BLD + self.post_attention_layernorm(out)
        out = self.mlp(self.pre_feedforward_layernorm(x_BLD))
        return x_BLD + self.post_feedforward_layernorm(out)


class Encoder(nnx.Module):
    """Gemma 2 encoder: `net(ids_BL int32, mask_BL, after=()) -> hidden states`, causal.

    See `hidden_states`. An id outside the vocabulary gives NaN.

    Raises: InputError for a sequence longer than the sliding window of every other layer.
    """

    def __init__(self, config: Config, dtype, remat: bool, rngs: Keys):
        c = config
        self.config, self.dtype, self.remat = config, dtype, remat
        self.embed_tokens = nnx.Embed(
            c.vocab_size,
            c.hidden_size,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            rngs=rngs,
        )
        self.blocks = stack(lambda r: Block(c, dtype, r), c.num_hidden_layers, rngs)
        self.norm = RMSNorm(c)

    def __call__(self, ids_BL: jax.Array, mask_BL: jax.Array, after: Sequence[int] = ()):
        c, length = self.config, ids_BL.shape[1]
        if length > c.sliding_window:
            raise InputError(
                f"ids: found {length} tokens; expected at most {c.sliding_window}, the sliding "
                "window"
            )
        # Rounded to the embeddings' dtype: the weights were trained with it.
        factor = jnp.asarray(c.hidden_size**0.5, self.dtype)
        return hidden_states(self, self.embed_tokens(ids_BL) * factor, mask_BL, after)


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
    keymap=KeyMap(renames=((r"^blocks/", "layers/#/"),)),
    rules=(
        (r"^embed_tokens/embedding$", P("tensor", "fsdp")),
        (r"^blocks/.*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel$", P(None, "fsdp", "tensor")),
        (r"^blocks/.*/(o_proj|down_proj)/kernel$", P(None, "tensor", "fsdp")),
        (r"^blocks/\w+layernorm/scale$", P(None, "fsdp")),
        (r"^norm/scale$", P("fsdp")),
    ),
)
