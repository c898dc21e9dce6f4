"""Context of an update: every need of the objective's terms, computed once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gadjax.diffusion.geometry import control_directions, directions, tangents
from gadjax.diffusion.rollout import Trajectory, interpolate_times, rollout
from gadjax.diffusion.schedules import add_noise
from gadjax.objectives.base import (
    Context,
    FirstStep,
    Needs,
    TeacherMap,
    first_step_weights,
    map_end,
    stream_keys,
)
from gadjax.training.backward_simulation import (
    backward_simulate,
    draw_grid,
    draw_steps,
    select_step,
    trained_steps,
)
from gadjax.training.state import StepSpec
from gadjax.types import Batch, Cond, Params, Prediction, PyTree


class Roles(NamedTuple):
    """Parameters of an update's networks; None for a network that the update does not have."""

    student: Params
    teacher: Params | None = None
    critic: Params | None = None
    discriminator: Params | None = None
    ema: Params | None = None
    networks: Mapping[str, Params] = {}  # frozen, by the name that a term gave them


@dataclass
class Workspace:
    """A context under construction, and what its providers leave to later ones.

    Attributes:
      step_spec: static specification of the step.
      needs: needs of all terms, completed.
      roles: parameters by role.
      cond: the student's conditioning, with the KV cache where one is kept.
      context: the context so far.
      noise: initial noise [B, H, W, C], ordered after the teacher's computations.
      separate_ends: first-step map -> its ends, of maps that no other term needs.
      trajectory: the student's full rollout from z.
      first_prediction: the student's prediction at its first step.
      x: latents [B, H, W, C] of the drawn steps, ordered after the teacher's computations.
    """

    step_spec: StepSpec
    needs: Needs
    roles: Roles
    cond: Cond
    context: Context
    noise: jax.Array
    separate_ends: dict[TeacherMap, jax.Array] = field(default_factory=dict)
    trajectory: Trajectory | None = None
    first_prediction: Prediction | None = None
    x: jax.Array | None = None

    def student(self, x, t) -> Prediction:
        return self.step_spec.denoiser(self.roles.student, x, t, self.cond)

    def full_rollout(self, z, detach_first_step: bool = False) -> Trajectory:
        """The student's steps from z to x0."""
        grid = self.context.grid_NB
        return rollout(
            self.student,
            self.context.schedule,
            z,
            jnp.asarray(self.step_spec.times) if grid is None else grid,
            solver=self.step_spec.solver(z),
            detach_first_step=detach_first_step,
        )

    def provide(self, **results: Any) -> None:
        self.context = replace(self.context, **results)

    def value_and_tangents(self, f: Callable, x, with_tangents):
        """(f(x), tangents along the context's directions), or (f(x), None)."""
        return tangents(f, x, self.context.direction_JBHWC) if with_tangents else (f(x), None)


def make_context(
    step_spec: StepSpec,
    needs: Needs,
    roles: Roles,
    batch: Batch,
    step: jax.Array | int = 0,
    memory: Mapping[str, PyTree] | None = None,
) -> Context:
    """Context for the terms of an objective; each need is computed once, the teacher's first.

    Args:
      step_spec: denoiser, grid and guidance.
      needs: union of the terms' needs.
      roles: parameters of the networks; gradients flow through the student's.
      batch: one microbatch.
      step: student updates done.
      memory: memories of the terms, by name.
    """
    needs = complete_needs(needs)
    work = start_workspace(step_spec, needs, roles, batch)
    work.provide(step=step, share=step / step_spec.steps, memory=memory)
    for is_needed, provider in PROVIDERS:
        if is_needed(needs):
            provider(work)
    return work.context


def has_full_rollout(needs: Needs) -> bool:
    """True if the student's rollout from z is computed, and with it every sample's first step."""
    return needs.endpoint or needs.full_map


def separate_maps(needs: Needs) -> list[TeacherMap]:
    """First-step maps that no other term needs, computed for every sample if there is a rollout."""
    return [spec for spec in needs.first_step if has_full_rollout(needs) and spec not in needs.maps]


def complete_needs(needs: Needs) -> Needs:
    """Needs with those that first steps imply: other maps than separate ones are shared, at the
    drawn step, and without a full rollout so is the student's prediction."""
    separate = separate_maps(needs)
    shared = {spec: False for spec in needs.first_step if spec not in separate}
    student = needs.student or bool(needs.first_step and not has_full_rollout(needs))
    return replace(needs, maps=shared | dict(needs.maps), student=student)


def start_workspace(step_spec: StepSpec, needs: Needs, roles: Roles, batch: Batch) -> Workspace:
    """Workspace whose context has the networks and the drawn steps."""
    denoiser = step_spec.denoiser
    guided, read = None, batch.override or batch.cond  # by the teacher
    if needs.uses_teacher:
        guided = denoiser.guided_fn(roles.teacher, read, batch.null, step_spec.guidance)
    # Without a full rollout the drawn step alone is differentiated, and recomputes keys and values
    # with its blocks: kept through the teacher's map and the backward pass, a KV cache costs more
    # memory than it saves work.
    drawn_step_only = needs.uses_teacher and not has_full_rollout(needs)
    cond = batch.cond if drawn_step_only else denoiser.cache_text(roles.student, batch.cond)

    def teacher_at(x, t, scale=None):
        if guided and scale is None:
            return guided(x, t)
        scale = step_spec.guidance if scale is None else scale
        return denoiser.guided(roles.teacher, x, t, read, batch.null, scale)

    def critic_at(x, t, scale=None):
        return denoiser.guided(roles.critic, x, t, batch.cond, batch.null, scale)

    context = Context(
        denoiser=denoiser,
        batch=batch,
        times=step_spec.times,
        guidance=step_spec.guidance,
        teacher=teacher_at,
        critic=None if roles.critic is None else critic_at,
        teacher_params=roles.teacher,
        critic_params=roles.critic,
        student_params=roles.student,
        ema_params=roles.ema,
        discriminator_params=roles.discriminator,
        networks=roles.networks,
        grid_NB=draw_grid(step_spec, batch),
        step_B=draw_steps(step_spec, batch),
        trained_steps=trained_steps(step_spec),
        detach_first_step=needs.detach_first_step,
    )
    return Workspace(step_spec, needs, roles, cond, context, batch.noise)


def provide_pixels(work: Workspace) -> None:
    """The frozen autoencoder's decoder: latents to pictures in [-1, 1], but not clipped to it, so
    that there is a gradient everywhere. Its activations are rematerialised."""
    decode, params = work.step_spec.decode, work.roles.networks["vae"]
    work.provide(pixels=lambda x0: jax.checkpoint(decode)(params, x0))


def provide_layers(work: Workspace) -> None:
    """The teacher's blocks that a student of fewer layers has."""
    work.provide(student_layers=work.step_spec.student_layers)


def provide_separate_maps(work: Workspace) -> None:
    """Ends of teacher maps from z for every sample's first step."""
    specs, context = separate_maps(work.needs), work.context
    maps = (teacher_map(context.at_first_step(), context.teacher, spec) for spec in specs)
    # The teacher has finished before any of the student's residuals wait for reverse mode.
    work.noise, ends = jax.lax.optimization_barrier((work.noise, [f(z) for f, z in maps]))
    work.separate_ends = dict(zip(specs, ends, strict=True))


def provide_endpoint(work: Workspace) -> None:
    """End of the student's full rollout from z, and its prediction at the first step."""
    work.trajectory = work.full_rollout(work.noise, work.needs.detach_first_step)
    work.provide(endpoint=work.trajectory.end)
    work.first_prediction = prediction_at_first_step(work.trajectory)


def provide_latents(work: Workspace) -> None:
    """Latents at the drawn steps, without gradient: the student's own, or the data's."""
    context, batch = work.context, work.context.batch
    step_B = context.step_B
    if work.step_spec.latents == "data":
        x = add_noise(context.schedule, batch.x0, batch.noise, context.t_B)
    elif work.trajectory is None:
        params, cond = jax.lax.stop_gradient((work.roles.student, work.cond))
        now = batch._replace(cond=cond)
        x = backward_simulate(work.step_spec, params, now, step_B, context.grid_NB)
    else:  # the full rollout has passed through these latents
        x = select_step(jax.lax.stop_gradient(work.trajectory.x), step_B)
    work.provide(x_BHWC=x)


def provide_maps(work: Workspace) -> None:
    """Teacher maps of the drawn steps and from z, and their tangents."""
    needs, context = work.needs, work.context
    maps = {spec: teacher_map(context, context.teacher, spec) for spec in needs.maps}
    if needs.tangent:
        work.provide(direction_JBHWC=draw_directions(needs, context, maps))
    results = [
        work.value_and_tangents(*maps[spec], with_tangents)
        for spec, with_tangents in needs.maps.items()
    ]
    # The teacher has finished here too.
    barrier = jax.lax.optimization_barrier((work.noise, context.x_BHWC, results))
    work.noise, work.x, results = barrier
    work.provide(maps=dict(zip(needs.maps, results, strict=True)))


def provide_drawn_step(work: Workspace) -> None:
    """The student's prediction at its drawn step, and tangents."""

    def step(x):
        return work.student(x, work.context.t_B)

    pair = work.value_and_tangents(step, work.x, work.needs.tangent)
    work.provide(student=pair)
    work.first_prediction = work.first_prediction or pair[0]


def provide_full_map(work: Workspace) -> None:
    """The student's full map from z, with gradient through every step, and tangents."""
    needs = work.needs

    def full_map(z):
        trajectory = work.full_rollout(z)
        return trajectory.end, prediction_at_first_step(trajectory) if needs.first_step else None

    (end, first_prediction), dots = work.value_and_tangents(full_map, work.noise, needs.tangent)
    work.provide(full_map=(end, dots and dots[0]))
    if work.trajectory is None:
        work.first_prediction = first_prediction
    if not needs.detach_first_step:
        work.provide(endpoint=end)


def provide_first_steps(work: Workspace) -> None:
    """First steps of the student beside those of teacher maps, separate ones and shared ones."""
    context, first_step = work.context, {}
    for spec in work.needs.first_step:
        end, weight_B = work.separate_ends.get(spec), first_step_weights(context)
        if end is None:
            end = context.maps[spec][0]
        else:
            weight_B = jnp.ones_like(weight_B)
        first_step[spec] = FirstStep(work.first_prediction, end, weight_B)
    work.provide(first_step=first_step)


# (condition on the needs, provider), in order. The teacher precedes the student's differentiated
# computations, so that its activations and the student's residuals are not live together.
PROVIDERS: tuple[tuple[Callable[[Needs], Any], Callable[[Workspace], None]], ...] = (
    (lambda n: n.pixels, provide_pixels),
    (lambda n: n.fewer_layers, provide_layers),
    (separate_maps, provide_separate_maps),
    (lambda n: n.endpoint and (n.detach_first_step or not n.full_map), provide_endpoint),
    (lambda n: n.student or any(spec.end != "whole" for spec in n.maps), provide_latents),
    (lambda n: True, provide_maps),
    (lambda n: n.student, provide_drawn_step),
    (lambda n: n.full_map, provide_full_map),
    (lambda n: n.first_step, provide_first_steps),
)


def prediction_at_first_step(trajectory: Trajectory) -> Prediction:
    """The network's prediction at the first step of a rollout."""
    return jax.tree.map(lambda steps: steps[0], trajectory.prediction)


def teacher_map(context: Context, teacher: Callable, spec: TeacherMap):
    """The teacher's ODE map of a spec, as a function, and its inputs [B, H, W, C].

    Args:
      context: drawn steps and the latents there, which are the inputs; z is for end="whole".
      teacher: (x_BHWC, t_B) -> Prediction, guided.
      spec: where the map ends, and in how many steps.

    Returns: f: [B, H, W, C] -> [B, H, W, C], and the x at which to evaluate it.
    """
    start_B, x = context.t_B, context.x_BHWC
    if spec.end == "whole":
        start_B, x = jnp.full_like(start_B, context.times[0]), context.batch.noise
    grid = interpolate_times(start_B, map_end(context, spec), spec.steps)
    return (lambda x: rollout(teacher, context.schedule, x, grid).end), x


def draw_directions(needs: Needs, context: Context, maps):
    """Directions [J, B, H, W, C] shared by all tangents of an update.

    Args:
      needs: kind and number of directions, and which maps have tangents.
      context: initial noise and the samples' keys.
      maps: map -> (function, inputs), of which kind "control" uses the first with tangents.
    """
    noise = context.batch.noise
    keys = stream_keys(context.batch.key, "direction")
    if needs.tangent.kind != "control":
        return directions(needs.tangent, keys, noise.shape[1:], noise.dtype)
    f, x = next(maps[spec] for spec, with_tangents in needs.maps.items() if with_tangents)
    return jax.lax.stop_gradient(control_directions(f, x, keys, needs.tangent.count))
