"""From an nnx module to pure functions of a nested dict."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from gadjax.ops.dual_attention import ATTENTION_CHECKPOINT
from gadjax.parallel.placement import constrain_batch
from gadjax.seeds import make_key
from gadjax.types import Params, TextKV


class Functional(NamedTuple):
    """A network as pure functions. `abstract` holds shapes and dtypes and takes no memory."""

    apply: Callable[..., Any]
    init: Callable[[jax.Array], Params]
    abstract: Params


class Keys:
    """The part of nnx.Rngs that layers use, counting in Python.

    Every draw from nnx.Rngs under eval_shape looks through the whole program so far: with many
    layers, minutes.
    """

    def __init__(self, key: jax.Array):
        self.key, self.count = key, 0

    def params(self) -> jax.Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


def functional(make: Callable[[Keys], nnx.Module]) -> Functional:
    """Leave nnx: `apply(params, *args, method="name")`, `init(key) -> params`, `abstract`."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(Keys(make_key(0)))))
    abstract = nnx.to_pure_dict(state)

    def apply(params, *args, method="__call__", **kwargs):
        return getattr(nnx.merge(graphdef, params), method)(*args, **kwargs)

    def init(key):
        return nnx.to_pure_dict(nnx.split(make(Keys(key)))[1])

    return Functional(apply, init, abstract)


def stack(make: Callable[[Keys], nnx.Module], count: int, rngs: Keys) -> nnx.Module:
    """One module whose every leaf has a leading axis of `count` layers."""
    return jax.vmap(lambda key: make(Keys(key)))(jax.random.split(rngs.params(), count))


def scan_blocks(
    blocks: nnx.Module, x, call: Callable[..., Any], remat: bool | str, context: Any = None
):
    """Run stacked blocks in order: `x = call(block, x)`; remat: see `recomputed`.

    told: what each is told as well, `call(block, x, told)`. Of a text's keys and values, in as many
      layers or more, each gets its own.
    """
    layers, of_text = len(jax.tree.leaves(blocks)[0]), isinstance(context, TextKV)

    def body(x, layer):
        block, kv = layer
        more = kv if of_text else context
        x = call(block, constrain_batch(x, tokens=True), *(() if more is None else (more,)))
        return constrain_batch(x, tokens=True), None

    kv = jax.tree.map(lambda a: a[:layers], context) if of_text else None
    # prevent_cse is for code outside scan; inside, it only blocks fusion.
    return jax.lax.scan(checkpointed(body, remat, prevent_cse=False), x, (blocks, kv))[0]


def checkpointed(f: Callable, remat: bool | str, **options) -> Callable:
    """f, which reverse mode computes again where `remat` is set. "results": all of it but what
    softmax attentions and feed-forwards give."""
    if not remat:
        return f
    return jax.checkpoint(f, policy=RESULTS if remat == "results" else None, **options)


def _narrows(primitive, *operands, **params) -> bool:
    """Whether this is a product of many channels that gives fewer, as a feed-forward's last: none
    takes more operations for what it gives. Seen in tangents too, which have no names."""
    if primitive is jax.lax.dot_general_p:
        (summed, _), (batch, _) = params["dimension_numbers"]
        x, weight = operands
        left = math.prod(weight.shape) // math.prod(x.shape[i] for i in summed)
        return not batch and left < math.prod(x.shape[i] for i in summed)
    if primitive is jax.lax.conv_general_dilated_p:
        spec = params["dimension_numbers"]
        return operands[1].shape[spec.rhs_spec[0]] < operands[0].shape[spec.lhs_spec[1]]
    return False


RESULTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(ATTENTION_CHECKPOINT), _narrows
)
