"""Instrumented update for debugging: finiteness of every network output, loss of every sample.

The instrumented program is the update itself with more results; the state stays as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gadjax.objectives.base import Context
from gadjax.objectives.compose import Sum
from gadjax.training.state import StepSpec
from gadjax.types import Params


class FiniteCounter:
    """Counts, by name, of recorded arrays (or trees of them) and of those that are not finite.

    Recorded by callbacks from the compiled program, and so inside scans and derivatives too.
    """

    def __init__(self):
        self.counts: dict[str, tuple[int, int]] = {}

    def record(self, name: str, tree: Any) -> Any:
        """Record `tree` under a name while a program is traced; returns `tree`."""
        leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
        if leaves:
            finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]).all()
            jax.debug.callback(partial(self._count, name), finite)
        return tree

    def _count(self, name: str, finite: Any) -> None:
        total, nonfinite = self.counts.get(name, (0, 0))
        self.counts[name] = total + 1, nonfinite + (not finite)

    def pop(self) -> dict[str, tuple[int, int]]:
        """Name -> (recorded, not finite) since the last call; waits for the running programs."""
        jax.effects_barrier()
        counts, self.counts = self.counts, {}
        return counts


@dataclass(frozen=True)
class InstrumentedSum(Sum):
    """Sum that records its terms' inputs and network outputs, and logs `TERM/loss_B` per sample."""

    counter: FiniteCounter

    def term_losses(self, context: Context):
        for name, weight, loss_B, extra in super().term_losses(observed(context, self.counter)):
            yield name, weight, loss_B, extra | {"loss_B": loss_B}

    def critic_loss(self, context: Context):
        return super().critic_loss(observed(context, self.counter))

    def discriminator_loss(self, context: Context):
        return super().discriminator_loss(observed(context, self.counter))


def observed(context: Context, counter: FiniteCounter) -> Context:
    """The context with its arrays recorded, and its networks wrapped to record their outputs."""
    batch = context.batch
    counter.record("batch", (batch.cond, batch.null, batch.noise, batch.x0))
    counter.record("student's latents", context.x_BHWC)
    for pair in (context.student, context.full_map):
        value, dot = pair or (None, None)
        counter.record("student", value)
        counter.record("student's tangents", dot)
    counter.record(
        "student", (context.endpoint, [first.prediction for first in context.first_step.values()])
    )
    counter.record("teacher's maps", [first.teacher_end for first in context.first_step.values()])
    for value, dot in context.maps.values():
        counter.record("teacher's maps", value)
        counter.record("teacher's tangents", dot)

    def recording(name: str, f: Callable | None):
        return f and (lambda *args, **kwargs: counter.record(name, f(*args, **kwargs)))

    roles = ("teacher", "critic", "student")

    def apply(params: Params, *args):
        nets = {role: getattr(context, f"{role}_params") for role in roles} | context.networks
        role = next((role for role, of_role in nets.items() if params is of_role), "a network")
        return counter.record(role, context.denoiser.apply(params, *args))

    return replace(
        context,
        denoiser=replace(context.denoiser, apply=apply),
        teacher=recording("teacher", context.teacher),
        critic=recording("critic", context.critic),
    )


def instrument(counter: FiniteCounter) -> Callable[[Callable], Callable]:
    """Wrapper of an update for `compile_steps(wrap=...)`: it records, and leaves the state alone.

    Its metrics also have each term's loss per sample, and `ROLE/grad_norm/GROUP` for the groups of
    parameters at the top of a network.
    """

    def wrap(step: Callable) -> Callable:
        def instrumented(step_spec: StepSpec, state, networks, batch):
            norms: dict[str, jax.Array] = {}
            objective = step_spec.objective
            step_spec = replace(
                step_spec,
                objective=InstrumentedSum(objective.parts, counter, names=objective.names),
                optimizers={
                    role: _with_group_norms(optimizer, f"{role}/grad_norm", norms)
                    for role, optimizer in step_spec.optimizers.items()
                },
            )
            # An offloaded tree would be updated in a branch, from which no norms come out.
            on_device = jax.device_put(state, jax.memory.Space.Device)
            _, metrics = step(step_spec, on_device, networks, batch)
            return state, metrics | norms

        return instrumented

    return wrap


def _with_group_norms(optimizer: optax.GradientTransformation, name: str, norms: dict):
    def update(grads, state, params):
        norms.update({f"{name}/{key}": optax.tree.norm(grads[key]) for key in grads})
        return optimizer.update(grads, state, params)

    return optax.GradientTransformation(optimizer.init, update)
