"""T5 encoder (transformers' T5EncoderModel): token ids and mask -> last hidden state.

Original T5 (relu) and T5 v1.1 (gated gelu). Raffel et al., arXiv:1910.10683; Shazeer,
arXiv:2002.05202. Shapes: B batch, L tokens (Q as queries, K as keys), D model width, N heads,
H width of a head.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from gadjax.errors import InputError
from gadjax.models import layers
from gadjax.models.config import POSITIVE_INTEGER, POSITIVE_NUMBER, is_positive
from gadjax.models.family import TextEncoder
from gadjax.models.ignored import warn_unknown_keys
from gadjax.models.keymap import KeyMap
from gadjax.models.module import Keys, scan_blocks, stack

CLASS_NAMES = ("T5EncoderModel",)

# feed_forward_proj -> the activation transformers derives from it (dense_act_fn).
ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu_new"}
DERIVED = ("is_decoder", "is_gated_act", "dense_act_fn")  # options that repeat it


@dataclass(frozen=True)
class Config:
    """Options of transformers' T5Config that change the encoder's output; same defaults."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> "Config":
        """Read a config.json. Raises: InputError naming the key that is absent or unsupported."""
        values = {}
        for field in fields(cls):
            value = cfg.get(field.name, field.default)
            if field.type is str:
                valid, expected = value in ACTIVATIONS, " or ".join(ACTIVATIONS)
            else:
                valid = is_positive(value, int, field.type)
                expected = POSITIVE_NUMBER if field.type is float else POSITIVE_INTEGER
            if not valid:
                _refuse(field.name, None if value is MISSING else value, expected)
            values[field.name] = value
        config = cls(**values)
        warn_unknown_keys(CLASS_NAMES[0], cfg, (*values, *DERIVED))

        derived = {
            "model_type": "t5",
            "is_decoder": False,
            "is_gated_act": config.gated,
            "dense_act_fn": ACTIVATIONS[config.feed_forward_proj],
        }
        for key, expected in derived.items():
            if cfg.get(key, expected) != expected:
                _refuse(key, cfg[key], repr(expected))
        # Each sign takes half of the buckets, and half of those count single positions.
        buckets, distance = (
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        if buckets % 4:
            _refuse("relative_attention_num_buckets", buckets, "a multiple of 4")
        if distance <= buckets // 4:
            _refuse("relative_attention_max_distance", distance, f"more than {buckets // 4}")
        return config


def _refuse(key: str, value: Any, expected: str):
    given = "no such key" if value is None else repr(value)
    raise InputError(f"T5EncoderModel config {key}: found {given}; expected {expected}")


def position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Relative position buckets [Q, K]: exact for near positions, logarithmic for far ones.

    A power-of-two distance lies on the edge of a bucket, where the last bit of a logarithm
    decides. So this is float32 on the host, as in the weights' training, and never the
    accelerator's logarithm.

    Args:
      length: number of positions; Q = K = length.
      buckets: number of buckets for both signs together.
      max_distance: distance from which on all positions share the last bucket.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int32), half - 1)
    return (relative > 0) * half + np.where(distance < exact, distance, far)


def _linear(n_in: int, n_out: int, std: float, dtype, rngs: Keys) -> nnx.Linear:
    return layers.Linear(
        n_in,
        n_out,
        use_bias=False,
        kernel_init=nnx.initializers.normal(std),
        dtype=dtype,
        rngs=rngs,
    )


def _norm(config: Config, dtype, rngs: Keys) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Pre-norm self-attention, plus the input. No 1/sqrt(H): T5 folds it into the scale of `q`."""

    def __init__(self, config: Config, dtype, rngs: Keys):
        d, h, n = config.d_model, config.d_kv, config.num_heads
        self.layer_norm = _norm(config, dtype, rngs)
        self.q = _linear(d, n * h, (d * h) ** -0.5, dtype, rngs)
        self.k = _linear(d, n * h, d**-0.5, dtype, rngs)
        self.v = _linear(d, n * h, d**-0.5, dtype, rngs)
        self.o = _linear(n * h, d, (n * h) ** -0.5, dtype, rngs)
        self.heads = n

    def __call__(self, x_BLD, position_NQK, mask_B11K):
        normed = self.layer_norm(x_BLD)
        q, k, v = (
            proj(normed).reshape(*normed.shape[:2], self.heads, -1)
            for proj in (self.q, self.k, self.v)
        )
        logits = jnp.einsum("BQNH,BKNH->BNQK", q, k, preferred_element_type=position_NQK.dtype)
        weights = jax.nn.softmax(logits + position_NQK + mask_B11K, axis=-1).astype(v.dtype)
        out = jnp.einsum("BNQK,BKNH->BQNH", weights, v)
        return x_BLD + self.o(out.reshape(*normed.shape[:2], -1))


class FeedForward(nnx.Module):
    """Pre-norm feed-forward: relu(wi) or gelu(wi_0) * wi_1, then wo, plus the input."""

    def __init__(self, config: Config, dtype, rngs: Keys):
        d, f = config.d_model, config.d_ff
        self.layer_norm = _norm(config, dtype, rngs)
        self.gated = config.gated
        if self.gated:
            self.wi_0 = _linear(d, f, d**-0.5, dtype, rngs)
            self.wi_1 = _linear(d, f, d**-0.5, dtype, rngs)
        else:
            self.wi = _linear(d, f, d**-0.5, dtype, rngs)
        self.wo = _linear(f, d, f**-0.5, dtype, rngs)

    def __call__(self, x_BLD):
        normed = self.layer_norm(x_BLD)
        if self.gated:
            hidden = jax.nn.gelu(self.wi_0(normed), approximate=True) * self.wi_1(normed)
        else:
            hidden = jax.nn.relu(self.wi(normed))
        return x_BLD + self.wo(hidden)


class Block(nnx.Module):
    """Encoder block: self-attention, then feed-forward."""

    def __init__(self, config: Config, dtype, rngs: Keys):
        self.attention = Attention(config, dtype, rngs)
        self.feed_forward = FeedForward(config, dtype, rngs)

    def __call__(self, x_BLD, position_NQK, mask_B11K):
        return self.feed_forward(self.attention(x_BLD, position_NQK, mask_B11K))


class Encoder(nnx.Module):
    """T5 encoder: `net(ids_BL int32, mask_BL) -> hidden_BLD`, after the final norm, no dropout.

    mask_BL is the attention mask: 1 (or True) at tokens, 0 at padding. Padding is not attended to,
    but has hidden states. An id outside the vocabulary gives NaN.
    """

    def __init__(self, config: Config, dtype, remat: bool, rngs: Keys):
        self.config, self.dtype, self.remat = config, dtype, remat
        self.shared = nnx.Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=nnx.initializers.normal(1.0),
            dtype=dtype,
            rngs=rngs,
        )
        # One table for all layers; in files it is part of block 0.
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            embedding_init=nnx.initializers.normal(config.d_model**-0.5),
            dtype=jnp.promote_types(dtype, jnp.float32),
            rngs=rngs,
        )
        self.blocks = stack(lambda r: Block(config, dtype, r), config.num_layers, rngs)
        self.final_layer_norm = _norm(config, dtype, rngs)

    def __call__(self, ids_BL, mask_BL):
        buckets_QK = position_buckets(
            ids_BL.shape[1],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        position_NQK = self.relative_attention_bias(jnp.asarray(buckets_QK)).transpose(2, 0, 1)
        lowest = jnp.finfo(jnp.float32).min
        mask_B11K = jnp.where(mask_BL[:, None, None, :] > 0, 0, lowest).astype(position_NQK.dtype)
        hidden_BLD = scan_blocks(
            self.blocks,
            self.shared(ids_BL),
            lambda block, x_BLD: block(x_BLD, position_NQK, mask_B11K),
            self.remat,
        )
        return self.final_layer_norm(hidden_BLD)


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
        renames=(
            (r"^blocks/(\w+)/layer_norm/", r"encoder/block/#/\1/layer_norm/"),
            (r"^blocks/attention/", "encoder/block/#/attention/SelfAttention/"),
            (r"^blocks/feed_forward/", "encoder/block/#/feed_forward/DenseReluDense/"),
            (r"/#/attention/", "/#/layer/0/"),
            (r"/#/feed_forward/", "/#/layer/1/"),
            (r"^final_layer_norm/", "encoder/final_layer_norm/"),
            (
                r"^relative_attention_bias/",
                "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/",
            ),
        ),
        tied_keys=(("encoder.embed_tokens.weight", "shared.weight"),),
    ),
    rules=(
        (r"^shared/embedding$", P("tensor", "fsdp")),
        (r"^relative_attention_bias/embedding$", P(None, "tensor")),
        (r"^blocks/.*/(q|k|v|wi|wi_0|wi_1)/kernel$", P(None, "fsdp", "tensor")),
        (r"^blocks/.*/(o|wo)/kernel$", P(None, "tensor", "fsdp")),
        (r"^blocks/.*/layer_norm/scale$", P(None, "fsdp")),
        (r"^final_layer_norm/scale$", P("fsdp")),
    ),
)
