"""Context of an update: every need of the objective's terms, computed once."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gadjax.diffusion.rollout import Trajectory
from gadjax.diffusion.schedules import add_noise
from gadjax.objectives.base import (
    Context,
    FirstStep,
    Needs,
    TeacherMap,
    first_step_weights,
)
from gadjax.training.backward_simulation import (
    backward_simulate,
    draw_grid,
    draw_steps,
    select_step,
    trained_steps,
)
from gadjax.training.state import StepSpec
from gadjax.training.workspace import (
    Roles,
    Workspace,
    draw_directions,
    part_of_workspace,
    tangent_blocks,
    teacher_map,
    teacher_of,
    value_and_tangents,
    walk,
)
from gadjax.types import Batch, Prediction, PyTree


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
    return [
        spec for spec in needs.first_step if has_full_rollout(needs) and spec not in needs.all_maps
    ]


def complete_needs(needs: Needs) -> Needs:
    """Needs with those that first steps imply: other maps than separate ones are shared, at the
    drawn step, and without a full rollout so is the student's prediction."""
    separate = separate_maps(needs)
    shared = tuple(spec for spec in needs.first_step if spec not in separate)
    student = needs.student or bool(needs.first_step and not has_full_rollout(needs))
    return replace(needs, maps=shared + needs.maps, student=student)


def start_workspace(step_spec: StepSpec, needs: Needs, roles: Roles, batch: Batch) -> Workspace:
    """Workspace whose context has the networks and the drawn steps."""
    denoiser = step_spec.denoiser

    def critic_at(x, t, scale=None):
        return denoiser.guided(roles.critic, x, t, batch.cond, batch.null, scale)

    context = Context(
        denoiser=denoiser,
        batch=batch,
        times=step_spec.times,
        guidance=step_spec.guidance,
        teacher=teacher_of(step_spec, needs, roles, batch),
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
        blocks=tangent_blocks(needs, batch),
        detach_first_step=needs.detach_first_step,
    )
    # Without a full rollout the drawn step alone is differentiated, and recomputes keys and values
    # with its blocks: kept through the teacher's map and the backward pass, a KV cache costs more
    # memory than it saves work.
    drawn_step_only = needs.uses_teacher and not has_full_rollout(needs)
    cond = batch.cond if drawn_step_only else denoiser.cache_text(roles.student, batch.cond)
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
    if needs.tangent:
        samples = part_of_workspace(work, context.blocks.chosen) if context.blocks else work
        work.provide(direction_JNHWC=draw_directions(samples))
    results = [
        value_and_tangents(
            work,
            partial(walk, spec=spec),
            spec in needs.maps,
            spec in needs.map_tangents,
        )
        for spec in needs.all_maps
    ]
    # The teacher has finished here too.
    barrier = jax.lax.optimization_barrier((work.noise, context.x_BHWC, results))
    work.noise, work.x, results = barrier
    work.provide(maps=dict(zip(needs.all_maps, results, strict=True)))


def provide_drawn_step(work: Workspace) -> None:
    """The student's prediction at its drawn step, and tangents."""

    def step(part):
        return lambda x: part.student(x, part.context.t_B), part.x

    pair = value_and_tangents(work, step, True, bool(work.needs.tangent))
    work.provide(student=pair)
    work.first_prediction = work.first_prediction or pair[0]


def provide_full_map(work: Workspace) -> None:
    """The student's full map from z, with gradient through every step, and tangents."""
    needs = work.needs

    def full_map(part):
        def f(z):
            trajectory = part.full_rollout(z)
            first = prediction_at_first_step(trajectory) if needs.first_step else None
            return trajectory.end, first

        return f, part.noise

    (end, first_prediction), dots = value_and_tangents(work, full_map, True, bool(needs.tangent))
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
    (lambda n: n.student or any(spec.end != "whole" for spec in n.all_maps), provide_latents),
    (lambda n: True, provide_maps),
    (lambda n: n.student, provide_drawn_step),
    (lambda n: n.full_map, provide_full_map),
    (lambda n: n.first_step, provide_first_steps),
)


def prediction_at_first_step(trajectory: Trajectory) -> Prediction:
    """The network's prediction at the first step of a rollout."""
    return jax.tree.map(lambda steps: steps[0], trajectory.prediction)
