"""CLIP text encoders (transformers' CLIPTextModel and CLIPTextModelWithProjection).

Radford et al., arXiv:2103.00020; the larger ones are OpenCLIP's, arXiv:2212.07143. Shapes: B
batch, L tokens, D width, N heads, H width of a head, P width of the pooled vector.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gadjax.errors import InputError
from gadjax.models import layers
from gadjax.models.config import POSITIVE_INTEGER, POSITIVE_NUMBER, is_positive, refuse
from gadjax.models.family import TextEncoder
from gadjax.models.ignored import IGNORED_TENSORS, warn_unknown_keys
from gadjax.models.keymap import KeyMap
from gadjax.models.module import Keys, scan_blocks, stack
from gadjax.ops.attention import attention

CLASS_NAMES = ("CLIPTextModel", "CLIPTextModelWithProjection")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
# eos_token_id of files from before 2023, which is no end token: the end is then the highest id.
LEGACY_EOS = 2


@dataclass(frozen=True)
class Config:
    """Options of transformers' CLIPTextConfig that change the encoder's output; same defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    projection_dim: int = 512
    eos_token_id: int = 49407
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    use_attention_mask: bool = False  # of diffusers: StableDiffusionPipeline masks padding
    projected: bool = False  # CLIPTextModelWithProjection; `architectures` in the file

    @property
    def activation(self) -> Callable[[jax.Array], jax.Array]:
        return ACTIVATIONS[self.hidden_act]

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> "Config":
        """Read a config.json. Raises: InputError naming the key that is absent or unsupported."""
        classes = cfg.get("architectures")
        if classes not in ([name] for name in CLASS_NAMES):
            refuse("architectures", classes, f"one of {', '.join(CLASS_NAMES)}")
        if (kind := cfg.get("model_type", "clip_text_model")) != "clip_text_model":
            refuse("model_type", kind, "'clip_text_model'")
        values = {"projected": classes[0] == CLASS_NAMES[1]}
        used = {f.name: f for f in fields(cls) if f.name != "projected"}
        warn_unknown_keys(classes[0], cfg, used)
        for key, value in cfg.items():
            if key not in used:
                continue
            if key == "use_attention_mask":
                value = False if value is None else value
                valid, expected = type(value) is bool, "true or false"
            elif key == "hidden_act":
                valid, expected = value in ACTIVATIONS, " or ".join(ACTIVATIONS)
            elif key == "layer_norm_eps":
                valid, expected = is_positive(value, float), POSITIVE_NUMBER
            else:
                valid, expected = is_positive(value, int), POSITIVE_INTEGER
            # Not used without the projection, and null in some files then.
            if not valid and (key != "projection_dim" or values["projected"]):
                refuse(key, value, expected)
            values[key] = value
        config = cls(**values)
        if config.hidden_size % config.num_attention_heads:
            refuse(
                "num_attention_heads",
                config.num_attention_heads,
                f"a divisor of hidden_size {config.hidden_size}",
            )
        return config


class Encoded(NamedTuple):
    """Outputs of CLIP's text encoder that pipelines use.

    Attributes:
      last: [B, L, D] last hidden states, after the final norm.
      penultimate: [B, L, D] hidden states before the last block, without a norm.
      pooled: [B, P] last hidden state at the end token, projected if the class has a projection.
    """

    last: jax.Array
    penultimate: jax.Array
    pooled: jax.Array


class Embeddings(nnx.Module):
    """Sum of token and position embeddings [B, L, D]."""

    def __init__(self, c: Config, dtype, rngs: Keys):
        init = nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Embed(
            c.vocab_size, c.hidden_size, embedding_init=init, dtype=dtype, rngs=rngs
        )
        self.position_embedding = nnx.Embed(
            c.max_position_embeddings, c.hidden_size, embedding_init=init, dtype=dtype, rngs=rngs
        )

    def __call__(self, ids_BL):
        return self.token_embedding(ids_BL) + self.position_embedding(jnp.arange(ids_BL.shape[1]))


def layer_norm(c: Config, dtype, rngs: Keys) -> nnx.LayerNorm:
    """Layer norm of the tokens."""
    # Statistics are in float32 at least; the fast variance would lose digits.
    return nnx.LayerNorm(
        c.hidden_size, epsilon=c.layer_norm_eps, use_fast_variance=False, dtype=dtype, rngs=rngs
    )


class Attention(nnx.Module):
    """Multi-head self-attention under an additive bias of the logits."""

    def __init__(self, c: Config, dtype, rngs: Keys):
        d = c.hidden_size
        self.q_proj = layers.Linear(d, d, dtype=dtype, rngs=rngs)
        self.k_proj = layers.Linear(d, d, dtype=dtype, rngs=rngs)
        self.v_proj = layers.Linear(d, d, dtype=dtype, rngs=rngs)
        self.out_proj = layers.Linear(d, d, dtype=dtype, rngs=rngs)
        self.heads = c.num_attention_heads

    def __call__(self, x_BLD, bias, has_keys_BL1):
        q, k, v = (
            proj(x_BLD).reshape(*x_BLD.shape[:2], self.heads, -1)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed_BLD = attention(q, k, v, bias).reshape(x_BLD.shape)
        return self.out_proj(jnp.where(has_keys_BL1, mixed_BLD, 0))


class FeedForward(nnx.Module):
    """MLP of a block: linear, activation, linear."""

    def __init__(self, c: Config, dtype, rngs: Keys):
        self.fc1 = layers.Linear(c.hidden_size, c.intermediate_size, dtype=dtype, rngs=rngs)
        self.fc2 = layers.Linear(c.intermediate_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.activation = c.activation

    def __call__(self, x_BLD):
        return self.fc2(self.activation(self.fc1(x_BLD)))


class Block(nnx.Module):
    """Pre-norm block: self-attention and MLP, with residuals."""

    def __init__(self, c: Config, dtype, rngs: Keys):
        self.layer_norm1 = layer_norm(c, dtype, rngs)
        self.self_attn = Attention(c, dtype, rngs)
        self.layer_norm2 = layer_norm(c, dtype, rngs)
        self.mlp = FeedForward(c, dtype, rngs)

    def __call__(self, x_BLD, bias, has_keys_BL1):
        x_BLD = x_BLD + self.self_attn(self.layer_norm1(x_BLD), bias, has_keys_BL1)
        return x_BLD + self.mlp(self.layer_norm2(x_BLD))


class TextModel(nnx.Module):
    """CLIP text encoder: `net(ids_BL int32, mask_BL=None) -> Encoded`, causal, without dropout.

    mask_BL is the attention mask: 1 (or True) at tokens, 0 at padding. An id outside the vocabulary
    gives NaN.

    Raises: InputError for a sequence longer than the table of positions.
    """

    def __init__(self, config: Config, dtype, remat: bool, rngs: Keys):
        c = config
        self.config, self.remat = config, remat
        self.embeddings = Embeddings(c, dtype, rngs)
        self.blocks = stack(lambda r: Block(c, dtype, r), c.num_hidden_layers, rngs)
        self.final_layer_norm = layer_norm(c, dtype, rngs)
        if c.projected:
            self.text_projection = layers.Linear(
                c.hidden_size, c.projection_dim, use_bias=False, dtype=dtype, rngs=rngs
            )

    def __call__(self, ids_BL: jax.Array, mask_BL: jax.Array | None = None) -> Encoded:
        length, most = ids_BL.shape[1], self.config.max_position_embeddings
        if length > most:
            raise InputError(f"ids: found {length} tokens; expected at most {most}")
        attended = jnp.tri(length, dtype=bool)[None, None]
        if mask_BL is not None:
            attended = attended & (mask_BL[:, None, None, :] > 0)
        bias = jnp.where(attended, 0, jnp.finfo(jnp.float32).min)
        # Left padding attends to nothing: of no keys torch gives zeros, and softmax an even mean.
        has_keys_BL1 = attended.any(-1).swapaxes(1, 2)

        embedded_BLD = self.embeddings(ids_BL)
        final_BLD, penultimate_BLD = scan_blocks(
            self.blocks,
            (embedded_BLD, embedded_BLD),
            lambda block, states: (block(states[0], bias, has_keys_BL1), states[0]),
            self.remat,
        )
        last_BLD = self.final_layer_norm(final_BLD)
        eos = self.config.eos_token_id
        # argmax takes the first, since padding may repeat the end token.
        end_B = jnp.argmax(ids_BL if eos == LEGACY_EOS else ids_BL == eos, axis=1)
        pooled_BP = jnp.take_along_axis(last_BLD, end_B[:, None, None], axis=1)[:, 0]
        if self.config.projected:
            pooled_BP = self.text_projection(pooled_BP)
        return Encoded(last_BLD, penultimate_BLD, pooled_BP)


def build(config: Config, *, dtype=jnp.float32, remat: bool = True) -> Callable[[Keys], nnx.Module]:
    """Constructor of the encoder, called with Keys.

    Args:
      config: the network's options.
      dtype: of the computation; parameters are initialised in float32.
      remat: rematerialisation of every block, see `checkpointed`.
    """
    return lambda rngs: TextModel(config, dtype, remat, rngs)


FAMILY = TextEncoder(
    class_names=CLASS_NAMES,
    config=Config,
    build=build,
    keymap=KeyMap(
        renames=((r"^blocks/", "encoder/layers/#/"), (r"^(?!text_projection/)", "text_model/")),
        ignored=tuple(IGNORED_TENSORS["CLIPTextModel"]),
        # transformers 5 writes CLIPTextModel, of the two classes, without the prefix.
        aliases=((r"^(?=(embeddings|encoder|final_layer_norm)\.)", "text_model."),),
    ),
    rules=(
        (r"^embeddings/token_embedding/embedding$", P("tensor", "fsdp")),
        (r"^embeddings/position_embedding/embedding$", P(None, "fsdp")),
        (r"^blocks/.*/(q_proj|k_proj|v_proj|fc1)/kernel$", P(None, "fsdp", "tensor")),
        (r"^blocks/.*/(out_proj|fc2)/kernel$", P(None, "tensor", "fsdp")),
        (r"^blocks/.*/(bias|scale)$", P(None, "fsdp")),
        (r"^final_layer_norm/(bias|scale)$", P("fsdp")),
        (r"^text_projection/kernel$", P("fsdp", "tensor")),
    ),
)
