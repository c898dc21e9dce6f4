"""Training of the comparison's students by the package's own updates, compiled as one program."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from gadjax.objectives import Sum
from gadjax.training.state import StepSpec, create_state
from gadjax.training.steps import CRITICS, critic_step, student_step
from gadjax.types import Params

if TYPE_CHECKING:
    from gadjax.analytic.bench import Bench


@partial(jax.jit, static_argnums=(0, 1, 2))
def train(
    bench: "Bench",
    objective: Sum,
    updates: int,
    start: Params,
    key,
    named: Mapping[str, Params],
):
    """Train a student; returns its EMA, the critic, if there is one, and the number of skipped,
    non-finite updates by role.

    Args:
      bench: teacher, denoiser and training settings.
      objective: sum of terms.
      updates: student updates.
      start: initial parameters.
      key: of all random numbers.
      named: frozen networks that terms may name.
    """
    step_spec, critic_updates = make_step_spec(bench, objective, updates)
    params = initial_params(bench, objective, start, key)
    # Beside named networks the teacher is one like them, whose MLP is zero.
    teacher = jax.tree.map(jnp.zeros_like, start) if objective.needs.networks else {}
    sources = {**named, "teacher": teacher, "start": start}
    networks = {name: sources[source] for name, source in objective.needs.networks.items()}
    networks |= {"teacher": teacher, "vae": {}}

    def batch(number):
        return bench.make_batch(
            jax.random.fold_in(jax.random.fold_in(key, 3), number), objective.needs
        )

    def critics(state, number):
        state, _ = critic_step(step_spec, state, networks, batch(number))
        return state, state.bad

    def update(state, number):
        first = number * (critic_updates + 1)
        if critic_updates:
            state, _ = jax.lax.scan(critics, state, first + jnp.arange(critic_updates))
        state, _ = student_step(step_spec, state, networks, batch(first + critic_updates))
        return state, {role: state.bad[role] > 0 for role in params}

    first_state = create_state(params, step_spec.optimizers, objective.init_memory())
    state, bad = jax.lax.scan(update, first_state, jnp.arange(updates))
    counts = {role: jnp.sum(count) for role, count in bad.items()}
    return state.ema, state.params.get("critic"), counts


def make_step_spec(bench: "Bench", objective: Sum, updates: int) -> tuple[StepSpec, int]:
    """Specification of a student's updates, and the critic's updates for each of them.

    Args:
      bench: teacher, denoiser and training settings.
      objective: sum of terms.
      updates: student updates.
    """
    needs = objective.needs
    roles = ["student"] + [role for role in CRITICS if getattr(needs, role)]
    critic_updates = bench.critic_updates if len(roles) > 1 else 0
    rate = optax.cosine_decay_schedule(bench.lr, updates, 0.05)
    critic_rate = optax.cosine_decay_schedule(2 * bench.lr, updates * max(critic_updates, 1), 0.05)
    optimizers = {
        role: optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adam(rate if role == "student" else critic_rate, b1=0.5, b2=0.95),
        )
        for role in roles
    }
    step_spec = StepSpec(
        bench.denoiser,
        objective,
        bench.times,
        1,
        optimizers,
        ema=0.98,
        steps=updates,
        rollout=bench.rollout,
        redraw=bench.redraw,
        critic_follow=bench.critic_follow if needs.critic else 0.0,
        decode=lambda _, x: x,  # samples are their own pictures
    )
    return step_spec, critic_updates


def initial_params(bench: "Bench", objective: Sum, start: Params, key) -> dict[str, Params]:
    """Initial parameters by role.

    Args:
      bench: teacher and student.
      objective: sum of terms.
      start: the student's.
      key: of the others.
    """
    needs, params = objective.needs, {"student": start}
    if needs.critic:
        params["critic"] = bench.init(jax.random.fold_in(key, 1))
    if needs.discriminator:
        init_key = jax.random.fold_in(key, 2)
        on_pixels = objective.trainer_needs(("discriminator",)).pixels
        width = bench.dim if on_pixels else 2 * bench.dim
        params["discriminator"] = objective.init_discriminator(init_key, width)
    return params
