"""The two updates: critic and student. Pure functions of (state, frozen networks, batch)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import optax

from gadjax.denoiser import Denoiser
from gadjax.geometry import directions, tangent
from gadjax.objectives.base import Context, Needs, Term, stream_keys
from gadjax.rollout import interpolate_times, rollout
from gadjax.training.state import TrainState
from gadjax.types import Batch, Params


@dataclass(frozen=True)
class Recipe:
    """Everything about a step that is fixed when it is traced.

    times: the student's grid, its last entry the schedule's clean time.
    guidance: the teacher's classifier-free guidance scale.
    """

    denoiser: Denoiser
    objective: Term
    times: tuple[float, ...]
    guidance: float
    optimizers: dict[str, optax.GradientTransformation]
    ema: float
    microbatches: int = 1


def make_context(
    recipe: Recipe,
    needs: Needs,
    student: Params,
    critic: Params | None,
    teacher: Params | None,
    batch: Batch,
) -> Context:
    """Meet every need once and hand the results over. Gradients reach `student` alone, and it
    only through `Context.student` and `Context.endpoint`."""
    denoiser, schedule, times = recipe.denoiser, recipe.denoiser.schedule, recipe.times
    n, samples = len(times) - 1, batch.noise.shape[0]

    def teacher_at(x, t):
        return denoiser.guided(teacher, x, t, batch.cond, batch.null, recipe.guidance)

    context = Context(
        denoiser=denoiser,
        batch=batch,
        times=times,
        teacher=teacher_at,
        critic=None if critic is None else lambda x, t: denoiser(critic, x, t, batch.cond),
        critic_params=critic,
        student_params=student,
        step_B=batch.stratum % n,
        cut_first=needs.cut_first,
    )
    if needs.endpoint:
        walk = rollout(
            lambda x, t: denoiser(student, x, t, batch.cond),
            schedule,
            batch.noise,
            jnp.asarray(times),
            cut_first=needs.cut_first,
        )
        context = replace(context, endpoint=walk.end)
    if not (needs.student or needs.maps):
        return context

    x = own_latents(recipe, jax.lax.stop_gradient(student), batch, context.step_B)
    context = replace(context, x_BHWC=x)
    direction = None
    if needs.tangent:
        keys = stream_keys(batch.key, "direction")
        direction = directions(needs.tangent, keys, batch.noise.shape[1:], batch.noise.dtype)
        context = replace(context, direction_BHWC=direction)
    if needs.student:

        def here(x):
            return denoiser(student, x, context.t_B, batch.cond)

        pair = tangent(here, x, direction) if needs.tangent else (here(x), None)
        context = replace(context, student=pair)
    maps = {}
    for spec, with_tangent in needs.maps.items():
        end_B = context.next_B
        if spec.end == "clean":
            end_B = jnp.full((samples,), schedule.clean, jnp.float32)
        grid = interpolate_times(context.t_B, end_B, spec.steps)

        def walk_map(x, grid=grid):
            return rollout(teacher_at, schedule, x, grid).end

        maps[spec] = tangent(walk_map, x, direction) if with_tangent else (walk_map(x), None)
    return replace(context, maps=maps)


def own_latents(recipe: Recipe, student: Params, batch: Batch, step_B):
    """The latent at which each sample's own rollout from z starts its drawn step."""
    if len(recipe.times) == 2:
        return batch.noise
    walk = rollout(
        lambda x, t: recipe.denoiser(student, x, t, batch.cond),
        recipe.denoiser.schedule,
        batch.noise,
        jnp.asarray(recipe.times[:-1]),
    )
    states = jnp.concatenate([walk.x, walk.end[None]])
    return states[step_B, jnp.arange(len(step_B))]


def accumulate(loss: Callable, params: Params, batch: Batch, microbatches: int):
    """Loss, metrics and gradients of the whole batch, one microbatch at a time.

    Equal to the large batch up to summation order, because a sample's randomness is its own.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if microbatches == 1:
        return value_and_grad(params, batch)
    # Strided: every device keeps the samples it has, and a share of every microbatch.
    split = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, part):
        found = value_and_grad(params, part)
        return jax.tree.map(jnp.add, total, found), None

    first = jax.tree.map(lambda x: x[0], split)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad, params, first)
    )
    total, _ = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda x: x / microbatches, total)


def apply_update(recipe: Recipe, state: TrainState, role: str, found):
    """One optimizer step, or none of it where anything in it is not finite."""
    (loss, metrics), grads = found
    updates, opt = recipe.optimizers[role].update(grads, state.opt[role], state.params[role])
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    keep = partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
    params = keep(optax.apply_updates(state.params[role], updates), state.params[role])
    bad = jnp.where(good, 0, state.bad[role] + 1)
    state = state._replace(
        params=state.params | {role: params},
        opt=state.opt | {role: keep(opt, state.opt[role])},
        bad=state.bad | {role: bad},
    )
    return state, {
        f"{role}/loss": loss,
        f"{role}/grad_norm": norm,
        f"{role}/bad": bad,
        **metrics,
    }


def student_step(recipe: Recipe, state: TrainState, teacher: Params | None, batch: Batch):
    """One student update; counts as a step."""

    def loss(student, batch):
        critic = state.params.get("critic")
        context = make_context(recipe, recipe.objective.needs, student, critic, teacher, batch)
        loss_B, metrics = recipe.objective(context)
        return jnp.mean(loss_B), metrics

    found = accumulate(loss, state.params["student"], batch, recipe.microbatches)
    state, metrics = apply_update(recipe, state, "student", found)
    # The average follows quickly at first, so that an early one is not mostly the start.
    decay = jnp.minimum(recipe.ema, (1.0 + state.step) / (10.0 + state.step))
    share = jnp.where(state.bad["student"] == 0, 1 - decay, 0)
    ema = jax.tree.map(lambda e, p: e + share * (p - e), state.ema, state.params["student"])
    return state._replace(step=state.step + 1, ema=ema), metrics


def critic_step(recipe: Recipe, state: TrainState, batch: Batch):
    """One critic update on the student's present pictures."""
    wanted = recipe.objective.needs
    needs = Needs(student=wanted.student, endpoint=wanted.endpoint, cut_first=wanted.cut_first)
    student = jax.lax.stop_gradient(state.params["student"])

    def loss(critic, batch):
        context = make_context(recipe, needs, student, critic, None, batch)
        return jnp.mean(recipe.objective.critic_loss(context)), {}

    found = accumulate(loss, state.params["critic"], batch, recipe.microbatches)
    return apply_update(recipe, state, "critic", found)
