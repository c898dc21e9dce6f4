"""An update looked at while it is computed: it changes nothing, and says what no run needs.

What is computed is the update's own program with more results.
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
    """By name how many arrays, or trees of them, a program came by, and how many were not finite.

    Told by callbacks out of the compiled program: an array inside a scan or a derivative is seen
    there as well.
    """

    def __init__(self):
        self.counts: dict[str, tuple[int, int]] = {}

    def record(self, name: str, tree: Any) -> Any:
        """To be called where the program is traced; returns `tree`."""
        leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
        if leaves:
            finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]).all()
            jax.debug.callback(partial(self._count, name), finite)
        return tree

    def _count(self, name: str, finite: Any) -> None:
        all_of, bad = self.counts.get(name, (0, 0))
        self.counts[name] = all_of + 1, bad + (not finite)

    def pop(self) -> dict[str, tuple[int, int]]:
        """What was told since the last time; waits for the programs that tell."""
        jax.effects_barrier()
        found, self.counts = self.counts, {}
        return found


@dataclass(frozen=True)
class InstrumentedSum(Sum):
    """A sum that tells what its terms are handed and what networks say to them, and of every term
    each sample's loss, `TERM/loss_B`."""

    seen: FiniteCounter

    def term_losses(self, context: Context):
        for name, weight, loss_B, extra in super().term_losses(observed(context, self.seen)):
            yield name, weight, loss_B, extra | {"loss_B": loss_B}

    def critic_loss(self, context: Context):
        return super().critic_loss(observed(context, self.seen))

    def discriminator_loss(self, context: Context):
        return super().discriminator_loss(observed(context, self.seen))


def observed(context: Context, seen: FiniteCounter) -> Context:
    """The same context; tells whether what is in it, and what networks say to it, is finite."""
    batch = context.batch
    seen.record("batch", (batch.cond, batch.null, batch.noise, batch.x0))
    seen.record("student's latents", context.x_BHWC)
    for pair in (context.student, context.full_map):
        value, dot = pair or (None, None)
        seen.record("student", value)
        seen.record("student's tangents", dot)
    seen.record("student", (context.endpoint, [first.said for first in context.first.values()]))
    seen.record("teacher's maps", [first.arrived for first in context.first.values()])
    for value, dot in context.maps.values():
        seen.record("teacher's maps", value)
        seen.record("teacher's tangents", dot)

    def telling(name: str, f: Callable | None):
        return f and (lambda *args, **more: seen.record(name, f(*args, **more)))

    roles = ("teacher", "critic", "student")

    def apply(params: Params, *args):
        role = next((r for r in roles if params is getattr(context, f"{r}_params")), "a network")
        return seen.record(role, context.denoiser.apply(params, *args))

    return replace(
        context,
        denoiser=replace(context.denoiser, apply=apply),
        teacher=telling("teacher", context.teacher),
        critic=telling("critic", context.critic),
    )


def instrument(seen: FiniteCounter) -> Callable[[Callable], Callable]:
    """For `compile_steps`. The metrics are then also each term's loss by sample, and
    `ROLE/grad_norm/GROUP` for the groups of parameters at the top of a network."""

    def look(step: Callable) -> Callable:
        def looked(step_spec: StepSpec, state, teacher, batch):
            norms: dict[str, jax.Array] = {}
            objective = step_spec.objective
            step_spec = replace(
                step_spec,
                objective=InstrumentedSum(objective.parts, seen, names=objective.names),
                optimizers={
                    role: _telling_norms(optimizer, f"{role}/grad_norm", norms)
                    for role, optimizer in step_spec.optimizers.items()
                },
            )
            # What waits on the host would be updated in a branch, out of which nothing is told.
            here = jax.device_put(state, jax.memory.Space.Device)
            _, metrics = step(step_spec, here, teacher, batch)
            return state, metrics | norms

        return looked

    return look


def _telling_norms(optimizer: optax.GradientTransformation, name: str, norms: dict):
    def update(grads, state, params):
        norms.update({f"{name}/{key}": optax.tree.norm(grads[key]) for key in grads})
        return optimizer.update(grads, state, params)

    return optax.GradientTransformation(optimizer.init, update)
