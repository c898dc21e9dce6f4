"""Gemma 2 as a text encoder (transformers' Gemma2Model): ids and mask -> last hidden state.

Gemma Team, arXiv:2408.00118. Shapes: B batch, L tokens (Q as queries, S as keys), D width, K heads
of keys and values, G queries for each of them, H width of a head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from gadjax.errors import InputError
from gadjax.models.config import POSITIVE_INTEGER, POSITIVE_NUMBER, is_positive, refuse
from gadjax.models.family import TextEncoder
from gadjax.models.ignored import warn_unknown_keys
from gadjax.models.keymap import KeyMap
from gadjax.models.layers import Linear, gelu_tanh
from gadjax.models.module import Keys, scan_blocks, stack

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
        kinds = {f.name: (int,) if f.type is int else (int, float) for f in fields(cls)}
        values, flat = {}, _with_flat_rope(cfg)
        warn_unknown_keys(CLASS_NAMES[0], flat, (*kinds, *FIXED, "layer_types"))
        for key, value in flat.items():
            if key in FIXED:
                if value not in FIXED[key]:
                    refuse(key, value, " or ".join(map(repr, FIXED[key])))
            elif key == "layer_types":
                if not set(value or ()) <= LAYER_TYPES:
                    refuse(key, value, " or ".join(sorted(LAYER_TYPES)))
            elif key in kinds:
                expected = POSITIVE_INTEGER if kinds[key] == (int,) else POSITIVE_NUMBER
                if not is_positive(value, *kinds[key]):
                    refuse(key, value, expected)
                values[key] = value
        config = cls(**values)
        if config.num_attention_heads % config.num_key_value_heads:
            refuse(
                "num_key_value_heads",
                config.num_key_value_heads,
                f"a divisor of num_attention_heads {config.num_attention_heads}",
            )
        if config.head_dim % 2:
            refuse("head_dim", config.head_dim, "an even number")
        return config


def _with_flat_rope(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Config with the keys that transformers 5 nests in rope_parameters at the top level."""
    flat = dict(cfg)
    rope = flat.pop("rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or set(rope) - {"rope_type", "rope_theta"}:
        refuse("rope_parameters", rope, "'rope_theta' and the rope_type 'default' alone")
    return flat | {key: value for key, value in rope.items() if key == "rope_theta"}


def frequencies(width: int, theta: float) -> np.ndarray:
    """RoPE frequencies: float32 [width / 2], radians per position of each pair of channels.

    Rounded where transformers rounds: far from the start an ulp of a frequency shows.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return np.float32(1) / (float(theta) ** exponents.astype(np.float64)).astype(np.float32)


def rotate(x_BLNH: jax.Array, angles_LR: jax.Array) -> jax.Array:
    """RoPE: rotate channels i of the first and of the second half by angles [L, H / 2]."""
    wide = jnp.promote_types(x_BLNH.dtype, jnp.float32)
    first, second = jnp.split(x_BLNH.astype(wide), 2, axis=-1)
    cos, sin = (f(angles_LR)[:, None].astype(wide) for f in (jnp.cos, jnp.sin))
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLNH.dtype)


class RMSNorm(nnx.Module):
    """RMS norm: x / rms(x) * (1 + scale), computed in at least float32."""

    def __init__(self, c: Config):
        self.scale = nnx.Param(jnp.zeros(c.hidden_size))
        self.eps = c.rms_norm_eps

    def __call__(self, x_BLD):
        wide = x_BLD.astype(jnp.promote_types(x_BLD.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (normed * (1 + self.scale[...].astype(wide.dtype))).astype(x_BLD.dtype)


def _linear(n_in: int, n_out: int, dtype, rngs: Keys) -> nnx.Linear:
    return Linear(n_in, n_out, use_bias=False, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Grouped-query attention with RoPE and soft-capped logits."""

    def __init__(self, c: Config, dtype, rngs: Keys):
        queries, keys = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        self.q_proj = _linear(c.hidden_size, queries, dtype, rngs)
        self.k_proj = _linear(c.hidden_size, keys, dtype, rngs)
        self.v_proj = _linear(c.hidden_size, keys, dtype, rngs)
        self.o_proj = _linear(queries, c.hidden_size, dtype, rngs)
        self.config = c

    def __call__(self, x_BLD, angles_LR, attended_B11QS):
        c, (b, length, _) = self.config, x_BLD.shape
        q, k, v = (
            proj(x_BLD).reshape(b, length, -1, c.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        k_BSKH = rotate(k, angles_LR)
        q_BQKGH = rotate(q, angles_LR).reshape(b, length, c.num_key_value_heads, -1, c.head_dim)
        wide = jnp.promote_types(q.dtype, jnp.float32)
        logits = jnp.einsum("BQKGH,BSKH->BKGQS", q_BQKGH, k_BSKH, preferred_element_type=wide)
        cap = c.attn_logit_softcapping
        logits = cap * jnp.tanh(logits * (c.query_pre_attn_scalar**-0.5 / cap))
        # Finite, so that a fully masked position attends evenly instead of giving NaN.
        logits = jnp.where(attended_B11QS, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out_BQKGH = jnp.einsum("BKGQS,BSKH->BQKGH", weights, v)
        return self.o_proj(out_BQKGH.reshape(b, length, -1))


class FeedForward(nnx.Module):
    """Gated feed-forward: down(gelu(gate) * up)."""

    def __init__(self, c: Config, dtype, rngs: Keys):
        self.gate_proj = _linear(c.hidden_size, c.intermediate_size, dtype, rngs)
        self.up_proj = _linear(c.hidden_size, c.intermediate_size, dtype, rngs)
        self.down_proj = _linear(c.intermediate_size, c.hidden_size, dtype, rngs)

    def __call__(self, x_BLD):
        return self.down_proj(gelu_tanh(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))


class Block(nnx.Module):
    """Block with norms before and after both branches, the latter ahead of the residual sum."""

    def __init__(self, c: Config, dtype, rngs: Keys):
        self.input_layernorm = RMSNorm(c)
        self.self_attn = Attention(c, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(c)
        self.pre_feedforward_layernorm = RMSNorm(c)
        self.mlp = FeedForward(c, dtype, rngs)
        self.post_feedforward_layernorm = RMSNorm(c)

    def __call__(self, x_BLD, angles_LR, attended_B11QS):
        out = self.self_attn(self.input_layernorm(x_BLD), angles_LR, attended_B11QS)
        x_BLD = x_BLD + self.post_attention_layernorm(out)
        out = self.mlp(self.pre_feedforward_layernorm(x_BLD))
        return x_BLD + self.post_feedforward_layernorm(out)


class Encoder(nnx.Module):
    """Gemma 2 encoder: `net(ids_BL int32, mask_BL) -> hidden_BLD`, causal, without dropout.

    The hidden states are those after the final norm. mask_BL is the attention mask: 1 (or True) at
    tokens, 0 at padding. Padding is not attended to, but has hidden states. An id outside the
    vocabulary gives NaN.

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

    def __call__(self, ids_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
        c, length = self.config, ids_BL.shape[1]
        if length > c.sliding_window:
            raise InputError(
                f"ids: found {length} tokens; expected at most {c.sliding_window}, the sliding "
                "window"
            )
        rates = frequencies(c.head_dim, c.rope_theta)
        angles_LR = jnp.arange(length, dtype=jnp.float32)[:, None] * rates
        attended_B11QS = jnp.tri(length, dtype=bool) & (mask_BL[:, None, None, None, :] > 0)
        # Rounded to the embeddings' dtype: the weights were trained with it.
        factor = jnp.asarray(c.hidden_size**0.5, self.dtype)
        hidden_BLD = scan_blocks(
            self.blocks,
            self.embed_tokens(ids_BL) * factor,
            lambda block, x_BLD: block(x_BLD, angles_LR, attended_B11QS),
            self.remat,
        )
        return self.norm(hidden_BLD)


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
