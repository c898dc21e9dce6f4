"""The two updates: critic and student. Pure functions of (state, frozen networks, batch)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax

from gadjax.denoiser import Denoiser
from gadjax.geometry import control_directions, directions, tangents
from gadjax.objectives.base import Context, First, Needs, TeacherMap, Term, stream_keys
from gadjax.objectives.compose import Sum
from gadjax.rollout import Trajectory, interpolate_times, rollout
from gadjax.schedules import expand
from gadjax.training.state import TrainState
from gadjax.training.updates import accumulate, apply_update, where_good
from gadjax.types import Batch, Params, Prediction

CRITICS = "critic", "discriminator"  # what the second update trains


@dataclass(frozen=True)
class Recipe:
    """Everything about a step that is fixed when it is traced.

    times: the student's grid, its last entry the schedule's clean time.
    guidance: the teacher's classifier-free guidance scale.
    shares: in how many parts a mesh splits a batch.
    """

    denoiser: Denoiser
    objective: Term
    times: tuple[float, ...]
    guidance: float
    optimizers: dict[str, optax.GradientTransformation]
    ema: float
    microbatches: int = 1
    shares: int = 1

    def pairs(self, samples: int) -> bool:
        """Whether two neighbours of a microbatch are on one device, whichever they are."""
        return samples % (2 * self.shares) == 0


def drawn_steps(stratum_B, n: int):
    """Steps of a grid of n, spread evenly; neighbours 2j and 2j + 1 have k and n - 1 - k."""
    turn_B, half = stratum_B // 2 % n, (n + 1) // 2
    step_B = jnp.where(turn_B < half, turn_B, n - 1 + half - turn_B)
    return jnp.where(stratum_B % 2, n - 1 - step_B, step_B)


def make_context(
    recipe: Recipe,
    needs: Needs,
    student: Params,
    critic: Params | None,
    teacher: Params | None,
    batch: Batch,
    discriminator: Params | None = None,
) -> Context:
    """Meet every need once and hand the results over."""
    denoiser, schedule, times = recipe.denoiser, recipe.denoiser.schedule, recipe.times
    # A walk to the end has everybody's first step; a map that other terms want too is made once, at
    # the drawn step.
    walks = needs.endpoint or needs.whole
    apart = [spec for spec in needs.first if walks and spec not in needs.maps]
    shared = {spec: False for spec in needs.first if spec not in apart}
    student_too = needs.student or bool(needs.first and not walks)
    needs = replace(needs, maps=shared | dict(needs.maps), student=student_too)

    guided = None
    if needs.distils:
        guided = denoiser.guide(teacher, batch.cond, batch.null, recipe.guidance)
    # A drawn step that is differentiated by itself makes keys and values again with its blocks:
    # kept through the teacher's map and the backward pass they are dearer than they are made.
    drawn = needs.distils and not walks
    told = batch.cond if drawn else denoiser.reading(student, batch.cond)

    def teacher_at(x, t, scale=None):
        if guided and scale is None:
            return guided(x, t)
        scale = recipe.guidance if scale is None else scale
        return denoiser.guided(teacher, x, t, batch.cond, batch.null, scale)

    def critic_at(x, t, scale=1):
        return denoiser.guided(critic, x, t, batch.cond, batch.null, scale)

    def student_at(x, t):
        return denoiser(student, x, t, told)

    context = Context(
        denoiser=denoiser,
        batch=batch,
        times=times,
        guidance=recipe.guidance,
        teacher=teacher_at,
        critic=None if critic is None else critic_at,
        teacher_params=teacher,
        critic_params=critic,
        student_params=student,
        discriminator_params=discriminator,
        step_B=drawn_steps(batch.stratum, len(times) - 1),
        cut_first=needs.cut_first,
    )
    noise, ends = batch.noise, {}
    if apart:
        firsts = (teacher_map(context.at_first(), teacher_at, spec) for spec in apart)
        # The teacher is through before anything of the student's waits for reverse mode.
        noise, found = jax.lax.optimization_barrier((noise, [f(z) for f, z in firsts]))
        ends = dict(zip(apart, found, strict=True))
    walk = said = None
    if needs.endpoint and (needs.cut_first or not needs.whole):
        walk = rollout(student_at, schedule, noise, jnp.asarray(times), cut_first=needs.cut_first)
        context = replace(context, endpoint=walk.end)
        said = first_of(walk)

    if needs.student or any(spec.end != "whole" for spec in needs.maps):
        if walk is None:
            held, cond = jax.lax.stop_gradient((student, told))
            x = own_latents(recipe, held, batch._replace(cond=cond), context.step_B)
        else:  # the rollout to the end has been there
            x = at_own_step(jax.lax.stop_gradient(walk.x), context.step_B)
        context = replace(context, x_BHWC=x)
    maps = {spec: teacher_map(context, teacher_at, spec) for spec in needs.maps}
    v = None
    if needs.tangent:
        v = draw_directions(needs, context, maps)
        context = replace(context, direction_JBHWC=v)

    def pair(f, x, with_tangents):
        return tangents(f, x, v) if with_tangents else (f(x), None)

    found = [pair(*maps[spec], wanted) for spec, wanted in needs.maps.items()]
    # As above.
    noise, x, found = jax.lax.optimization_barrier((noise, context.x_BHWC, found))
    context = replace(context, maps=dict(zip(needs.maps, found, strict=True)))
    if needs.student:
        own = pair(lambda x: student_at(x, context.t_B), x, needs.tangent)
        context = replace(context, student=own)
        said = said or own[0]
    if needs.whole:

        def whole(z):
            walk = rollout(student_at, schedule, z, jnp.asarray(times))
            return walk.end, first_of(walk) if needs.first else None

        value, dots = pair(whole, noise, needs.tangent)
        context = replace(context, whole=(value[0], dots and dots[0]))
        if walk is None:
            said = value[1]
        if not needs.cut_first:
            context = replace(context, endpoint=value[0])
    first = {}
    for spec in needs.first:
        if spec in ends:
            first[spec] = First(said, ends[spec], jnp.ones_like(context.first_B))
        else:
            first[spec] = First(said, context.maps[spec][0], context.first_B)
    return replace(context, first=first)


def first_of(walk: Trajectory) -> Prediction:
    """What the network said at the first step of a walk."""
    return jax.tree.map(lambda said: said[0], walk.prediction)


def teacher_map(context: Context, teacher: Callable, spec: TeacherMap):
    """The map, and the points at which it is wanted: the context's own, or z for a whole one."""
    start_B, x = context.t_B, context.x_BHWC
    if spec.end == "whole":
        start_B, x = jnp.full_like(start_B, context.times[0]), context.batch.noise
    grid = interpolate_times(start_B, context.map_end(spec), spec.steps)
    return (lambda x: rollout(teacher, context.schedule, x, grid).end), x


def draw_directions(needs: Needs, context: Context, maps):
    """The directions [J, B, H, W, C] that all tangents of a step share."""
    noise = context.batch.noise
    keys = stream_keys(context.batch.key, "direction")
    if needs.tangent.kind != "control":
        return directions(needs.tangent, keys, noise.shape[1:], noise.dtype)
    f, x = next(maps[spec] for spec, wanted in needs.maps.items() if wanted)
    return jax.lax.stop_gradient(control_directions(f, x, keys, needs.tangent.count))


def at_own_step(states, step_B):
    """Of states [n, B, ...] each sample's at its own step."""
    return states[step_B, jnp.arange(len(step_B))]


def own_latents(recipe: Recipe, student: Params, batch: Batch, step_B):
    """The latent [B, H, W, C] at which each sample's own rollout from z starts its step.

    Two neighbours, who need k and n - 1 - k evaluations, take turns in one walk of n - 1, where
    each device has both: half of what a walk for each would cost.
    """
    starts, schedule = jnp.asarray(recipe.times[:-1]), recipe.denoiser.schedule
    n = len(starts)
    if n == 1:
        return batch.noise

    def walk(x, times, cond):
        return rollout(lambda x, t: recipe.denoiser(student, x, t, cond), schedule, x, times)

    if not recipe.pairs(len(step_B)):
        found = walk(batch.noise, starts, batch.cond)
        return at_own_step(jnp.concatenate([found.x, found.end[None]]), step_B)

    def member(which):
        def one(x):
            return x.reshape(-1, 2, *x.shape[1:])[:, which]

        return one(batch.noise), batch.cond.each(one), one(step_B)

    (first, first_cond, arrival_B), (second, second_cond, _) = member(0), member(1)

    def choose(one_B):
        return lambda a, b: jnp.where(expand(one_B, a), a, b)

    def turn(x, arrived, now):
        return jax.tree.map(choose(arrival_B == now), (second, x), (x, arrived))

    def step(carry, now):
        x, arrived = turn(*carry, now)
        place_B = jnp.where(now < arrival_B, now, now - arrival_B)
        cond = first_cond.each(choose(now < arrival_B), second_cond)
        return (walk(x, starts[jnp.stack([place_B, place_B + 1])], cond).end, arrived), None

    carry, _ = jax.lax.scan(step, (first, first), jnp.arange(n - 1))
    of_second, of_first = turn(*carry, n - 1)
    return jnp.stack([of_first, of_second], 1).reshape(batch.noise.shape)


def student_step(recipe: Recipe, state: TrainState, teacher: Params | None, batch: Batch):
    """One student update; counts as a step."""

    def loss(student, batch):
        critic, discriminator = (state.params.get(role) for role in CRITICS)
        needs = recipe.objective.needs
        context = make_context(recipe, needs, student, critic, teacher, batch, discriminator)
        loss_B, metrics = recipe.objective(context)
        return jnp.mean(loss_B), metrics | {"student/loss_B": loss_B}

    found = accumulate(loss, state.params["student"], batch, recipe.microbatches, recipe.pairs)
    state, metrics = apply_update(recipe.optimizers, state, "student", found)
    # The average follows quickly at first, so that an early one is not mostly the start.
    decay = jnp.minimum(recipe.ema, (1.0 + state.step) / (10.0 + state.step))

    def follow(ema, student):
        return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, student), student

    good = state.bad["student"] == 0
    ema, _ = where_good(good, follow, state.ema, state.params["student"])
    return state._replace(step=state.step + 1, ema=ema), metrics


def critic_step(recipe: Recipe, state: TrainState, teacher: Params | None, batch: Batch):
    """One update of critic and discriminator on the student's present pictures.

    They are handed what the terms that train them need, but no networks beyond those: teacher is
    read by a discriminator of its features, and by maps.
    """
    roles = [role for role in CRITICS if getattr(recipe.objective.needs, role)]
    wanted = (Sum(()) + recipe.objective).needs_of(roles)
    needs = replace(wanted, critic=False, discriminator=False)  # handed over in any case
    student = jax.lax.stop_gradient(state.params["student"])

    def loss(params, batch):
        critic, discriminator = (params.get(role) for role in CRITICS)
        context = make_context(recipe, needs, student, critic, teacher, batch, discriminator)
        own = {role: getattr(recipe.objective, f"{role}_loss")(context) for role in roles}
        losses = {role: jnp.mean(loss_B) for role, loss_B in own.items()}
        return sum(losses.values()), losses | {f"{role}/loss_B": own[role] for role in roles}

    params = {role: state.params[role] for role in roles}
    (_, losses), grads = accumulate(loss, params, batch, recipe.microbatches, recipe.pairs)
    metrics = {}
    for role in roles:
        own = {f"{role}/loss_B": losses[f"{role}/loss_B"]}
        found = (losses[role], own), grads[role]
        state, more = apply_update(recipe.optimizers, state, role, found)
        metrics |= more
    return state, metrics
