"""Gradient accumulation over microbatches; optimizer updates applied only if finite; offload."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gadjax.training.state import TrainState
from gadjax.types import Batch, Metrics, Params


def accumulate(
    loss: Callable,
    params: Params,
    batch: Batch,
    microbatches: int,
    neighbours: Callable[[int], int],
):
    """Loss, metrics and gradients of a batch, accumulated over its microbatches.

    Equal to one large batch up to summation order, because a sample's randomness depends on its key
    alone.

    Args:
      loss: (params, batch) -> (loss, metrics). Scalar metrics are averaged; those with an entry per
        sample [B] keep the order of the batch.
      params: parameters to differentiate.
      batch: the global batch.
      microbatches: into how many equal parts it is split.
      neighbours: samples of a microbatch -> how many neighbours stay in one microbatch, because
        they are drawn for together (`StepSpec.neighbours`).

    Returns: (loss, metrics), gradients; as `jax.value_and_grad` with `has_aux`.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if microbatches == 1:
        return value_and_grad(params, batch)
    group = neighbours(len(batch.stratum) // microbatches)
    return _accumulate(value_and_grad, params, batch, microbatches, group)


def _accumulate(value_and_grad: Callable, params: Params, batch: Batch, parts: int, group: int):
    """Scan of `accumulate` over `parts` microbatches; `group` neighbours stay in one of them."""

    def loss_and_grads(params, part):
        (value, metrics), grads = value_and_grad(params, part)
        scalars, per_sample = split_metrics(metrics)
        return ((value, scalars), grads), per_sample

    # Strided: every device keeps the samples it has, and a share of every microbatch.
    def deal(x, before, after):
        x = x.reshape(before, after, group, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(len(x), -1, *x.shape[3:])

    split = jax.tree.map(lambda x: deal(x, -1, parts), batch)

    def add(total, part):
        result, per_sample = loss_and_grads(params, part)
        return jax.tree.map(jnp.add, total, result), per_sample

    first = jax.tree.map(lambda x: x[0], split)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(loss_and_grads, params, first)[0]
    )
    total, per_sample = jax.lax.scan(add, zeros, split)
    (value, scalars), grads = jax.tree.map(lambda x: x / parts, total)
    per_sample = jax.tree.map(lambda x: deal(x.reshape(-1), parts, -1).reshape(-1), per_sample)
    return (value, scalars | per_sample), grads


def split_metrics(metrics: Metrics) -> tuple[Metrics, Metrics]:
    """Scalar metrics, and metrics with an entry per sample."""
    per_sample = {name: value for name, value in metrics.items() if jnp.ndim(value)}
    return {name: value for name, value in metrics.items() if name not in per_sample}, per_sample


def tree_where(condition, new, old):
    """`jnp.where` with one scalar condition over the leaves of two trees."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def memory_spaces(tree):
    """Memory space of every leaf: of the device, or of its host."""
    return jax.tree.map(lambda x: jax.typeof(x).memory_space, tree)


def has_host_leaves(tree) -> bool:
    """True if a leaf is in host memory."""
    return jax.memory.Space.Host in jax.tree.leaves(memory_spaces(tree))


def apply_if_finite(finite, change: Callable, *trees):
    """change(*trees) if finite, otherwise the trees unchanged.

    A select, or a branch where a tree is in host memory, for the transfers of `on_device`.

    Args:
      finite: bool scalar.
      change: trees -> tuple of their new values.
      trees: in device or host memory.
    """
    if has_host_leaves(trees):
        return jax.lax.cond(finite, change, lambda *unchanged: unchanged, *trees)
    return tree_where(finite, change(*trees), trees)


def on_device(change: Callable) -> Callable:
    """`change` with an offloaded tree fetched from host memory, and its new values put back there.

    For a branch of `apply_if_finite`, which starts once `finite` is known; a transfer anywhere else
    would put the tree on the device long before that, while activations are live.

    Args:
      change: (offloadable, other) -> new values of both. offloadable: tree in device or host
        memory; other: tree in device memory.
    """

    def with_transfers(offloadable, other):
        if not has_host_leaves(offloadable):
            return change(offloadable, other)
        spaces = memory_spaces(offloadable)
        offloadable, other = change(jax.device_put(offloadable, jax.memory.Space.Device), other)
        return jax.tree.map(jax.device_put, offloadable, spaces), other

    return with_transfers


def apply_update(
    optimizers: dict[str, optax.GradientTransformation],
    state: TrainState,
    role: str,
    loss_and_grads,
):
    """One optimizer step of a network, skipped if its loss, gradient or update is not finite.

    Args:
      optimizers: optimizer by role.
      state: training state before the update.
      role: student, critic or discriminator.
      loss_and_grads: ((loss, metrics), gradients), as `accumulate` returns it.

    Returns: the new state, and metrics: `ROLE/bad` counts skipped updates in a row, `ROLE/loss_B`
      has each sample's loss.
    """
    (loss, metrics), grads = loss_and_grads
    norm = optax.tree.norm(grads)

    def change(opt, other):
        params, _ = other
        updates, new_opt = optimizers[role].update(grads, opt, params)
        finite = jnp.isfinite(optax.tree.norm(updates))
        new_params = optax.apply_updates(params, updates)
        return tree_where(finite, new_opt, opt), (tree_where(finite, new_params, params), finite)

    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    other = state.params[role], jnp.zeros_like(finite)
    opt, (params, finite) = apply_if_finite(finite, on_device(change), state.opt[role], other)
    bad = jnp.where(finite, 0, state.bad[role] + 1)
    state = state._replace(
        params=state.params | {role: params},
        opt=state.opt | {role: opt},
        bad=state.bad | {role: bad},
    )
    return state, {
        f"{role}/loss": loss,
        f"{role}/grad_norm": norm,
        f"{role}/bad": bad,
        **metrics,
    }
