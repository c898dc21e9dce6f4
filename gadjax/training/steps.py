"""The two updates, student's and critic's: pure functions of state, frozen networks and batch."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp

from gadjax.diffusion.experts import Experts
from gadjax.models.params import merge_params
from gadjax.objectives.compose import Sum
from gadjax.training.context import Roles, make_context
from gadjax.training.state import StepSpec, TrainState
from gadjax.training.updates import (
    accumulate,
    apply_if_finite,
    apply_update,
    on_device,
    tree_where,
)
from gadjax.types import Batch, Metrics, Params

CRITICS = "critic", "discriminator"  # networks of the second update
EARLIER = "earlier"  # key of `Experts` without a late one, where the student has an earlier expert


def student_step(
    step_spec: StepSpec, state: TrainState, networks: Mapping[str, Params], batch: Batch
):
    """One student update and what follows it (`finish_step`); advances `state.step`.

    Args:
      step_spec: what is fixed when the update is traced.
      state: training state.
      networks: parameters of the frozen networks: "teacher", where the objective uses one; those
        that terms name; and under "ROLE/base" those that a role does not train itself.
      batch: the global batch.

    Returns: the new state, and metrics.
    """

    def loss(student, batch):
        needs = step_spec.objective.needs
        trained = state.params | {"student": student}
        roles = make_roles(trained, networks, state.ema if needs.ema else None)
        context = make_context(step_spec, needs, roles, batch, state.step, state.memory)
        loss_B, metrics = step_spec.objective(context)
        return jnp.mean(loss_B), metrics | {"student/loss_B": loss_B}

    loss_and_grads = accumulate(
        loss, state.params["student"], batch, step_spec.microbatches, step_spec.neighbours
    )
    state, metrics = apply_update(step_spec.optimizers, state, "student", loss_and_grads)
    return finish_step(step_spec, state, metrics), metrics


def make_roles(
    trained: Mapping[str, Params], networks: Mapping[str, Params], ema: Params | None = None
) -> Roles:
    """Networks of an update: the trained ones complete, adapters on their frozen kernels, and the
    student beside its earlier expert.

    Args:
      trained: parameters that each role trains; the student's with gradients.
      networks: frozen networks, as `student_step` takes them.
      ema: average of the student's parameters.
    """

    critic = trained.get("critic")
    return Roles(
        complete_student(trained["student"], networks),
        networks.get("teacher"),
        critic and merge_params(critic, networks.get("critic/base")),
        trained.get("discriminator"),
        ema and complete_student(ema, networks),
        networks,
    )


def complete_student(trained: Params, networks: Mapping[str, Params]) -> Params | Experts:
    """The student of what it trains, on its frozen base and beside its earlier expert."""
    params, experts = merge_params(trained, networks.get("student/base")), networks.get(EARLIER)
    return params if experts is None else replace(experts, late=params)


def finish_step(step_spec: StepSpec, state: TrainState, metrics: Metrics) -> TrainState:
    """State after a step: counted; EMA, critic and memories follow the student if it is finite."""
    finite, student = state.bad["student"] == 0, state.params["student"]
    # A lower decay at first, so that an early average is not mostly the initial parameters.
    decay = jnp.minimum(step_spec.ema, (1.0 + state.step) / (10.0 + state.step))

    def follow(share):
        def change(average, student):
            return jax.tree.map(lambda e, p: e + share * (p - e), average, student), student

        return change

    ema, _ = apply_if_finite(finite, on_device(follow(1 - decay)), state.ema, student)
    state = state._replace(step=state.step + 1, ema=ema)
    if step_spec.critic_follow:
        share = step_spec.critic_follow
        critic, _ = apply_if_finite(finite, follow(share), state.params["critic"], student)
        state = state._replace(params=state.params | {"critic": critic})
    if state.memory:
        memory = step_spec.objective.remember(state.memory, metrics)
        state = state._replace(memory=tree_where(finite, memory, state.memory))
    return state


def critic_step(
    step_spec: StepSpec, state: TrainState, networks: Mapping[str, Params], batch: Batch
):
    """One update of critic and discriminator on samples of the current student.

    The context has the needs of the terms that train them: the teacher is read by a discriminator
    of its features, and by maps.

    Args:
      step_spec: what is fixed when the update is traced.
      state: training state.
      networks: parameters of the frozen networks, as `student_step` takes them.
      batch: the global batch.

    Returns: the new state, and metrics.
    """
    roles = [role for role in CRITICS if getattr(step_spec.objective.needs, role)]
    trainer_needs = (Sum(()) + step_spec.objective).trainer_needs(roles)
    needs = replace(trainer_needs, critic=False, discriminator=False)  # in the context in any case

    def loss(params, batch):
        student = jax.lax.stop_gradient(state.params["student"])
        networks_now = make_roles({"student": student} | params, networks)
        context = make_context(step_spec, needs, networks_now, batch, state.step, state.memory)
        losses_B = {role: getattr(step_spec.objective, f"{role}_loss")(context) for role in roles}
        losses = {role: jnp.mean(loss_B) for role, loss_B in losses_B.items()}
        return sum(losses.values()), losses | {f"{role}/loss_B": losses_B[role] for role in roles}

    params = {role: state.params[role] for role in roles}
    (_, losses), grads = accumulate(
        loss, params, batch, step_spec.microbatches, step_spec.neighbours
    )
    metrics = {}
    for role in roles:
        per_sample = {f"{role}/loss_B": losses[f"{role}/loss_B"]}
        loss_and_grads = (losses[role], per_sample), grads[role]
        state, role_metrics = apply_update(step_spec.optimizers, state, role, loss_and_grads)
        metrics |= role_metrics
    return state, metrics


UPDATES = {"critic": critic_step, "student": student_step}  # by their names in `Run.order`
