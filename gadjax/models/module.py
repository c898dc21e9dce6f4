"""nnx modules as pure functions of nested dicts, stacked layers, and rematerialisation."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from gadjax.ops.dual_attention import ATTENTION_CHECKPOINT
from gadjax.ops.shard_mapped import is_on_cpu
from gadjax.parallel.placement import constrain_batch
from gadjax.seeds import make_key
from gadjax.types import Params, TextKV

# Blocks that a CPU runs without a loop where none is rematerialised: a loop copies what reverse
# mode stores of each block into arrays of all layers.
MAX_UNROLLED = 4


class Functional(NamedTuple):
    """A network as pure functions. `abstract` holds shapes and dtypes and takes no memory."""

    apply: Callable[..., Any]
    init: Callable[[jax.Array], Params]
    abstract: Params


class Keys:
    """Stream of random keys for initialisers: the part of nnx.Rngs that layers use.

    It counts in Python, because every draw from nnx.Rngs under eval_shape traverses all that was
    traced before it, which takes minutes with many layers.
    """

    def __init__(self, key: jax.Array):
        self.key, self.count = key, 0

    def params(self) -> jax.Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


def functional(make: Callable[[Keys], nnx.Module]) -> Functional:
    """Pure functions of a module: `apply(params, *args, method="name")`, `init(key) -> params`."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(Keys(make_key(0)))))
    abstract = nnx.to_pure_dict(state)

    def apply(params, *args, method="__call__", **kwargs):
        return getattr(nnx.merge(graphdef, params), method)(*args, **kwargs)

    def init(key):
        return nnx.to_pure_dict(nnx.split(make(Keys(key)))[1])

    return Functional(apply, init, abstract)


def stack(make: Callable[[Keys], nnx.Module], count: int, rngs: Keys) -> nnx.Module:
    """Stack `count` layers into one module: every leaf has a leading layer axis."""
    return jax.vmap(lambda key: make(Keys(key)))(jax.random.split(rngs.params(), count))


def scan_blocks(
    blocks: nnx.Module, x, call: Callable[..., Any], remat: bool | str, context: Any = None
):
    """Run stacked blocks in order, as one `jax.lax.scan`: `x = call(block, x)`.

    Args:
      blocks: a module of stacked layers, see `stack`.
      x: activations, a pytree of arrays with the batch axis first.
      call: (block, x) -> x; with a context (block, x, context) -> x.
      remat: rematerialisation of each block, see `checkpointed`.
      context: extra argument of every block; a stacked KV cache, of as many layers or more, is
        scanned with the layers.

    Returns: x after the last block.
    """
    layers, has_kv = len(jax.tree.leaves(blocks)[0]), isinstance(context, TextKV)

    def body(x, layer):
        block, kv = layer
        extra = kv if has_kv else context
        x = call(block, constrain_batch(x, tokens=True), *(() if extra is None else (extra,)))
        return constrain_batch(x, tokens=True), None

    kv = jax.tree.map(lambda a: a[:layers], context) if has_kv else None
    unroll = not remat and layers <= MAX_UNROLLED and is_on_cpu(None)
    # prevent_cse is for code outside scan; inside, it only blocks fusion.
    body = checkpointed(body, remat, prevent_cse=False)
    return jax.lax.scan(body, x, (blocks, kv), unroll=unroll)[0]


def scan_through(
    blocks: nnx.Module,
    x,
    counts: Sequence[int],
    call: Callable[..., Any],
    remat: bool | str,
    context: Any = None,
) -> list:
    """Activations after each of several numbers of stacked blocks, in one pass.

    Args:
      blocks, x, call, remat, context: as for `scan_blocks`.
      counts: rising numbers of blocks, from 1.
    """
    outputs, start = [], 0
    for end in counts:
        kv = _layers(context, start, end) if isinstance(context, TextKV) else context
        x = scan_blocks(_layers(blocks, start, end), x, call, remat, kv)
        outputs.append(x)
        start = end
    return outputs


def scan_stacks(
    stacks: Sequence[nnx.Module], x, counts: Sequence[int], call: Callable[..., Any], remat
) -> tuple[list, Any]:
    """Activations after each of several numbers of blocks, of stacks that follow each other.

    Args:
      stacks: modules of stacked layers; all take and return the same activations.
      x, call, remat: as for `scan_blocks`.
      counts: rising numbers of blocks, from 1; those beyond the stacks are the caller's.

    Returns: activations after each count within the stacks, and after the last block that ran.
    """
    outputs, start = [], 0
    for blocks in stacks:
        size = len(jax.tree.leaves(blocks)[0])
        inside = [c - start for c in counts if start < c <= start + size]
        through = size if counts[-1] > start + size else 0  # later blocks need the stack's end
        ends = inside + [through] * (through > 0 and through not in inside)
        if ends:
            after = scan_through(blocks, x, ends, call, remat)
            outputs, x = outputs + after[: len(inside)], after[-1]
        start += size
    return outputs, x


def _layers(stacked, start: int, end: int):
    """Layers `start` to before `end` of stacked parameters or caches."""
    return jax.tree.map(lambda leaf: leaf[start:end], stacked)


def checkpointed(f: Callable, remat: bool | str, **options) -> Callable:
    """Rematerialise f in reverse mode (`jax.checkpoint`) where `remat` is set.

    Args:
      f: the function.
      remat: False stores every intermediate; True recomputes all of them; "results" recomputes
        all but the outputs of softmax attention and feed-forward layers.
      options: of `jax.checkpoint`.
    """
    if not remat:
        return f
    return jax.checkpoint(f, policy=SAVE_RESULTS if remat == "results" else None, **options)


def _is_down_projection(primitive, *operands, **params) -> bool:
    """Checkpoint policy: save products that reduce the number of channels.

    The last product of a feed-forward is one: no other takes more operations per number of its
    output. The policy goes by shapes because it must match tangents too, which have no names.
    """
    if primitive is jax.lax.dot_general_p:
        (summed, _), (batch, _) = params["dimension_numbers"]
        x, weight = operands
        outputs = math.prod(weight.shape) // math.prod(x.shape[i] for i in summed)
        return not batch and outputs < math.prod(x.shape[i] for i in summed)
    if primitive is jax.lax.conv_general_dilated_p:
        spec = params["dimension_numbers"]
        return operands[1].shape[spec.rhs_spec[0]] < operands[0].shape[spec.lhs_spec[1]]
    return False


SAVE_RESULTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(ATTENTION_CHECKPOINT), _is_down_projection
)
