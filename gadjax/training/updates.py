"""From a loss to a new state: gradients in microbatches, and an update or none of it."""

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
    can_pair: Callable[[int], bool],
):
    """Loss, metrics and gradients of the whole batch, one microbatch at a time.

    Equal to the large batch up to summation order, because a sample's randomness is its own.
    loss: (params, batch) -> (loss, metrics). Metrics that are scalars are averaged, those with an
    entry per sample [B] keep the order of the batch. pairs: whether neighbours of so many samples
    walk together.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if microbatches == 1:
        return value_and_grad(params, batch)

    def part_of(params, part):
        (value, metrics), grads = value_and_grad(params, part)
        scalars, own = split_metrics(metrics)
        return ((value, scalars), grads), own

    # Strided: every device keeps the samples it has, and a share of every microbatch; neighbours
    # stay together where they walk together.
    together = 2 if can_pair(len(batch.stratum) // microbatches) else 1

    def dealt(x, before, after):
        x = x.reshape(before, after, together, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(len(x), -1, *x.shape[3:])

    split = jax.tree.map(lambda x: dealt(x, -1, microbatches), batch)

    def add(total, part):
        found, own = part_of(params, part)
        return jax.tree.map(jnp.add, total, found), own

    first = jax.tree.map(lambda x: x[0], split)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part_of, params, first)[0]
    )
    total, own = jax.lax.scan(add, zeros, split)
    (value, scalars), grads = jax.tree.map(lambda x: x / microbatches, total)
    own = jax.tree.map(lambda x: dealt(x.reshape(-1), microbatches, -1).reshape(-1), own)
    return (value, scalars | own), grads


def split_metrics(metrics: Metrics) -> tuple[Metrics, Metrics]:
    """The scalars, and what has an entry per sample."""
    own = {name: value for name, value in metrics.items() if jnp.ndim(value)}
    return {name: value for name, value in metrics.items() if name not in own}, own


def tree_where(good, new, old):
    """The new tree where good, the old one otherwise."""
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)


def apply_if_finite(good, change: Callable, waiting, given):
    """change(waiting, given) -> both anew, where good; otherwise both as they are.

    What waits may do so in the host's memory, and goes back there. Then it is fetched in a branch,
    which begins when `good` is known: brought in any other way it would lie on the device long
    before, while activations do.
    """
    spaces = jax.tree.map(lambda x: jax.typeof(x).memory_space, waiting)
    if jax.memory.Space.Host not in jax.tree.leaves(spaces):
        return tree_where(good, change(waiting, given), (waiting, given))

    def branch(waiting, given):
        waiting, given = change(jax.device_put(waiting, jax.memory.Space.Device), given)
        return jax.tree.map(jax.device_put, waiting, spaces), given

    return jax.lax.cond(good, branch, lambda *unchanged: unchanged, waiting, given)


def apply_update(
    optimizers: dict[str, optax.GradientTransformation], state: TrainState, role: str, found
):
    """One optimizer step, or none of it where anything in it is not finite.

    The metrics say so: `ROLE/bad` in a row, and `ROLE/loss_B` each sample's own loss.
    """
    (loss, metrics), grads = found
    norm = optax.tree.norm(grads)

    def change(opt, given):
        params, _ = given
        updates, new = optimizers[role].update(grads, opt, params)
        good = jnp.isfinite(optax.tree.norm(updates))
        moved = optax.apply_updates(params, updates)
        return tree_where(good, new, opt), (tree_where(good, moved, params), good)

    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    given = state.params[role], jnp.zeros_like(good)
    opt, (params, good) = apply_if_finite(good, change, state.opt[role], given)
    bad = jnp.where(good, 0, state.bad[role] + 1)
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
