"""Softmax attention of all networks.

Two implementations, chosen by the kind of pass. A pass for values alone uses the fastest one. A
tangent pass (`tangent_pass`, which `gadjax.diffusion.geometry` sets) computes value and tangent
together, with a custom transpose, so that reverse mode through jax.jvp saves nothing of size N x M.
Both run as Pallas kernels on devices that have them (`gadjax.ops.kernels`), and in blocks of
queries elsewhere.
"""

from functools import partial

import jax

from gadjax.ops.dual_attention import (
    dual_attention,
    mix,
    named_for_checkpoint,
    over_query_blocks,
    softmax,
)
from gadjax.ops.kernels import dual_with_kernels, kernels_for, value_with_kernels

# A user context is part of jax.jit's cache key, so that a function traced for one kind of pass is
# retraced for the other.
tangent_pass = jax.make_user_context(False)


def attention(
    q_BNHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Softmax(q k / sqrt(K) + bias) v, with logits and softmax in at least float32.

    Args:
      q_BNHK: queries, N positions of H heads of K channels.
      k_BMHK, v_BMHK: keys and values, M positions.
      bias: added to the logits; broadcasts to [B, H, N, M]. In a tangent pass it takes no
        derivative.

    Returns: [B, N, H, K] in the dtype of the values. Outside a tangent pass it is differentiable
      in both modes, repeatedly (with kernels in reverse mode, once); inside one, by jax.jvp and by
      reverse mode through that, which is what the pass is for.
    """
    f = _with_tangent if tangent_pass.value else _primal
    return f(q_BNHK, k_BMHK, v_BMHK, bias)


def _primal(q, k, v, bias):
    kernels = kernels_for(q, k, bias)
    return (
        value_attention(q, k, v, bias)
        if kernels is None
        else value_with_kernels(kernels, q, k, v, bias)
    )


def value_attention(q, k, v, bias=None):
    """Attention values in blocks of queries, each rematerialised in reverse mode.

    Args:
      q, k, v, bias: as for `attention`.
    """

    def block(queries, keys, bias):
        (q,), (k, v) = queries, keys
        return mix(softmax(q, k, bias), v).astype(v.dtype), ()

    return named_for_checkpoint(over_query_blocks(block, (q,), (k, v), bias)[0])


_with_tangent = jax.custom_jvp(_primal)


@partial(_with_tangent.defjvp, symbolic_zeros=True)
def _jvp(primals, tangents):
    q, k, v, bias = primals
    zero = [type(t) is jax.custom_derivatives.SymbolicZero for t in tangents[:3]]
    tq, tk, tv = (
        jax.numpy.zeros_like(x) if is_zero else t
        for x, t, is_zero in zip(primals, tangents, zero, strict=False)
    )
    if zero[1] and zero[2]:
        tk = tv = None
    kernels = kernels_for(q, k, bias)
    dual = dual_attention if kernels is None else partial(dual_with_kernels, kernels)
    return dual(q, k, v, bias, tq, tk, tv)
