"""The two updates: critic and student. Pure functions of (state, frozen networks, batch)."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from gadjax.objectives.compose import Sum
from gadjax.training.context import make_context
from gadjax.training.state import StepSpec, TrainState
from gadjax.training.updates import accumulate, apply_if_finite, apply_update
from gadjax.types import Batch, Params

CRITICS = "critic", "discriminator"  # what the second update trains


def student_step(step_spec: StepSpec, state: TrainState, teacher: Params | None, batch: Batch):
    """One student update; counts as a step."""

    def loss(student, batch):
        critic, discriminator = (state.params.get(role) for role in CRITICS)
        needs = step_spec.objective.needs
        context = make_context(step_spec, needs, student, critic, teacher, batch, discriminator)
        loss_B, metrics = step_spec.objective(context)
        return jnp.mean(loss_B), metrics | {"student/loss_B": loss_B}

    found = accumulate(
        loss, state.params["student"], batch, step_spec.microbatches, step_spec.can_pair
    )
    state, metrics = apply_update(step_spec.optimizers, state, "student", found)
    # The average follows quickly at first, so that an early one is not mostly the start.
    decay = jnp.minimum(step_spec.ema, (1.0 + state.step) / (10.0 + state.step))

    def follow(ema, student):
        return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, student), student

    good = state.bad["student"] == 0
    ema, _ = apply_if_finite(good, follow, state.ema, state.params["student"])
    return state._replace(step=state.step + 1, ema=ema), metrics


def critic_step(step_spec: StepSpec, state: TrainState, teacher: Params | None, batch: Batch):
    """One update of critic and discriminator on the student's present pictures.

    They are handed what the terms that train them need, but no networks beyond those: teacher is
    read by a discriminator of its features, and by maps.
    """
    roles = [role for role in CRITICS if getattr(step_spec.objective.needs, role)]
    wanted = (Sum(()) + step_spec.objective).trainer_needs(roles)
    needs = replace(wanted, critic=False, discriminator=False)  # handed over in any case
    student = jax.lax.stop_gradient(state.params["student"])

    def loss(params, batch):
        critic, discriminator = (params.get(role) for role in CRITICS)
        context = make_context(step_spec, needs, student, critic, teacher, batch, discriminator)
        own = {role: getattr(step_spec.objective, f"{role}_loss")(context) for role in roles}
        losses = {role: jnp.mean(loss_B) for role, loss_B in own.items()}
        return sum(losses.values()), losses | {f"{role}/loss_B": own[role] for role in roles}

    params = {role: state.params[role] for role in roles}
    (_, losses), grads = accumulate(loss, params, batch, step_spec.microbatches, step_spec.can_pair)
    metrics = {}
    for role in roles:
        own = {f"{role}/loss_B": losses[f"{role}/loss_B"]}
        found = (losses[role], own), grads[role]
        state, more = apply_update(step_spec.optimizers, state, role, found)
        metrics |= more
    return state, metrics
