"""Parts of causal language models that encode text: options, rotations, grouped attention.

Shapes: B batch, L tokens (Q as queries, S as keys), D width, K heads of keys and values, G queries
for each of them, H width of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gadjax.errors import InputError
from gadjax.models.config import POSITIVE_INTEGER, POSITIVE_NUMBER, is_positive, refuse
from gadjax.models.ignored import warn_unknown_keys
from gadjax.models.layers import Linear
from gadjax.models.module import Keys, checkpointed, scan_blocks
from gadjax.parallel.placement import constrain_batch


def read_options(
    config: type, cfg: Mapping[str, Any], name: str, fixed: Mapping[str, tuple], layers: set[str]
) -> Any:
    """Read a transformers config.json of a causal language model.

    Args:
      config: the Config, a dataclass of positive numbers.
      cfg: the content of the file.
      name: of the class, a key of `ignored.IGNORED`.
      fixed: options with the values that are supported.
      layers: supported values of layer_types.

    Returns: the Config.
    Raises: InputError naming the key that is unsupported.
    """
    kinds = {f.name: (int,) if f.type is int else (int, float) for f in fields(config)}
    values, flat = {}, _with_flat_rope(cfg)
    warn_unknown_keys(name, flat, (*kinds, *fixed, "layer_types"))
    for key, value in flat.items():
        if key in fixed:
            if value not in fixed[key]:
                refuse(key, value, " or ".join(map(repr, fixed[key])))
        elif key == "layer_types":
            if not set(value or ()) <= layers:
                refuse(key, value, " or ".join(sorted(layers)))
        elif key in kinds:
            expected = POSITIVE_INTEGER if kinds[key] == (int,) else POSITIVE_NUMBER
            if not is_positive(value, *kinds[key]):
                refuse(key, value, expected)
            values[key] = value
    c = config(**values)
    if c.num_attention_heads % c.num_key_value_heads:
        expected = f"a divisor of num_attention_heads {c.num_attention_heads}"
        refuse("num_key_value_heads", c.num_key_value_heads, expected)
    if c.head_dim % 2:
        refuse("head_dim", c.head_dim, "an even number")
    return c


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


def linear(n_in: int, n_out: int, dtype, rngs: Keys) -> nnx.Linear:
    """Linear layer without a bias, as all of these models' are."""
    return Linear(n_in, n_out, use_bias=False, dtype=dtype, rngs=rngs)


class GroupedAttention(nnx.Module):
    """Causal grouped-query attention with RoPE. A model overrides `normed` and `scaled`."""

    def __init__(self, c: Any, dtype, rngs: Keys):
        queries, keys = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        self.q_proj = linear(c.hidden_size, queries, dtype, rngs)
        self.k_proj = linear(c.hidden_size, keys, dtype, rngs)
        self.v_proj = linear(c.hidden_size, keys, dtype, rngs)
        self.o_proj = linear(queries, c.hidden_size, dtype, rngs)
        self.config = c

    def normed(self, q_BLNH: jax.Array, k_BLKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys as they are rotated."""
        return q_BLNH, k_BLKH

    def scaled(self, logits_BKGQS: jax.Array) -> jax.Array:
        """Products of queries and keys as the softmax takes them."""
        return logits_BKGQS * self.config.head_dim**-0.5

    def __call__(self, x_BLD, angles_LR, attended_B11QS):
        c, (b, length, _) = self.config, x_BLD.shape
        q, k, v = (
            proj(x_BLD).reshape(b, length, -1, c.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotate(x, angles_LR) for x in self.normed(q, k))
        q_BQKGH = q.reshape(b, length, c.num_key_value_heads, -1, c.head_dim)
        wide = jnp.promote_types(q.dtype, jnp.float32)
        logits = self.scaled(
            jnp.einsum("BQKGH,BSKH->BKGQS", q_BQKGH, k, preferred_element_type=wide)
        )
        # Finite, so that a fully masked position attends evenly instead of giving NaN.
        logits = jnp.where(attended_B11QS, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out_BQKGH = jnp.einsum("BKGQS,BSKH->BQKGH", weights, v)
        return self.o_proj(out_BQKGH.reshape(b, length, -1))


class FeedForward(nnx.Module):
    """Gated feed-forward: down(activation(gate) * up)."""

    def __init__(self, c: Any, activation: Callable[[jax.Array], jax.Array], dtype, rngs: Keys):
        self.gate_proj = linear(c.hidden_size, c.intermediate_size, dtype, rngs)
        self.up_proj = linear(c.hidden_size, c.intermediate_size, dtype, rngs)
        self.down_proj = linear(c.intermediate_size, c.hidden_size, dtype, rngs)
        self.activation = activation

    def __call__(self, x_BLD):
        return self.down_proj(self.activation(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))


def positions_and_mask(c: Any, mask_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Angles [L, H / 2] of all positions, padding too, and what each query may attend to.

    Args:
      c: the model's options.
      mask_BL: attention mask, 1 (or True) at tokens.

    Returns: angles, and a mask [B, 1, 1, Q, S] of the earlier tokens and the query itself.
    """
    length = mask_BL.shape[1]
    angles_LR = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies(
        c.head_dim, c.rope_theta
    )
    return angles_LR, jnp.tri(length, dtype=bool) & (mask_BL[:, None, None, None, :] > 0)


def hidden_states(encoder: nnx.Module, x_BLD: jax.Array, mask_BL, after: Sequence[int] = ()):
    """Hidden states of a causal language model.

    Args:
      encoder: has `config`, stacked `blocks`, a final `norm` and `remat`.
      x_BLD: token embeddings.
      mask_BL: attention mask: 1 (or True) at tokens, 0 at padding, which is not attended to but has
        hidden states.
      after: rising numbers of blocks, for the hidden states after each of them, without a norm;
        later blocks are not run.

    Returns: the last hidden state [B, L, D] after the final norm; with `after`, a tuple of one
      [B, L, D] for each number.
    Raises: InputError for a number of blocks that the model does not have.
    """
    layers = encoder.config.num_hidden_layers
    if after and not 1 <= after[0] <= after[-1] <= layers:
        raise InputError(
            f"num_hidden_layers: found {layers}; expected {max(after)} or more, after which the "
            "pipeline reads hidden states"
        )
    angles_LR, attended_B11QS = positions_and_mask(encoder.config, mask_BL)

    def call(block, x_BLD):
        return block(x_BLD, angles_LR, attended_B11QS)

    if after:
        return _states_after(encoder, x_BLD, after, call)
    return encoder.norm(scan_blocks(encoder.blocks, x_BLD, call, encoder.remat))


def _states_after(encoder, x_BLD, counts, call) -> tuple[jax.Array, ...]:
    """Hidden states after each of several numbers of blocks.

    Blocks are read from the stack by their number: a slice of its first ones (as in `scan_through`)
    would be a copy of most of a large model.
    """

    def body(x_BLD, number):
        block = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), encoder.blocks
        )
        return constrain_batch(call(block, constrain_batch(x_BLD)), tokens=True), None

    states, body = [], checkpointed(body, encoder.remat, prevent_cse=False)
    for start, end in zip((0, *counts), counts, strict=False):
        x_BLD, _ = jax.lax.scan(body, x_BLD, jnp.arange(start, end))
        states.append(x_BLD)
    return tuple(states)
