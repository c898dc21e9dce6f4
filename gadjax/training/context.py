"""What an update hands to its terms: every need met once."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from gadjax.diffusion.geometry import control_directions, directions, tangents
from gadjax.diffusion.rollout import Trajectory, interpolate_times, rollout
from gadjax.objectives.base import Context, FirstStep, Needs, TeacherMap, stream_keys
from gadjax.training.backward_simulation import (
    backward_simulate,
    select_step,
    stratified_step_indices,
)
from gadjax.training.state import StepSpec
from gadjax.types import Batch, Params, Prediction


def make_context(
    step_spec: StepSpec,
    needs: Needs,
    student: Params,
    critic: Params | None,
    teacher: Params | None,
    batch: Batch,
    discriminator: Params | None = None,
) -> Context:
    """Meet every need once and hand the results over."""
    denoiser, schedule, times = step_spec.denoiser, step_spec.denoiser.schedule, step_spec.times
    # A walk to the end has everybody's first step; a map that other terms want too is made once, at
    # the drawn step.
    walks = needs.endpoint or needs.full_map
    apart = [spec for spec in needs.first if walks and spec not in needs.maps]
    shared = {spec: False for spec in needs.first if spec not in apart}
    student_too = needs.student or bool(needs.first and not walks)
    needs = replace(needs, maps=shared | dict(needs.maps), student=student_too)

    guided = None
    if needs.uses_teacher:
        guided = denoiser.guided_fn(teacher, batch.cond, batch.null, step_spec.guidance)
    # A drawn step that is differentiated by itself makes keys and values again with its blocks:
    # kept through the teacher's map and the backward pass they are dearer than they are made.
    drawn = needs.uses_teacher and not walks
    told = batch.cond if drawn else denoiser.cache_text(student, batch.cond)

    def teacher_at(x, t, scale=None):
        if guided and scale is None:
            return guided(x, t)
        scale = step_spec.guidance if scale is None else scale
        return denoiser.guided(teacher, x, t, batch.cond, batch.null, scale)

    def critic_at(x, t, scale=1):
        return denoiser.guided(critic, x, t, batch.cond, batch.null, scale)

    def student_at(x, t):
        return denoiser(student, x, t, told)

    context = Context(
        denoiser=denoiser,
        batch=batch,
        times=times,
        guidance=step_spec.guidance,
        teacher=teacher_at,
        critic=None if critic is None else critic_at,
        teacher_params=teacher,
        critic_params=critic,
        student_params=student,
        discriminator_params=discriminator,
        step_B=stratified_step_indices(batch.stratum, len(times) - 1),
        detach_first_step=needs.detach_first_step,
    )
    noise, ends = batch.noise, {}
    if apart:
        firsts = (teacher_map(context.at_first_step(), teacher_at, spec) for spec in apart)
        # The teacher is through before anything of the student's waits for reverse mode.
        noise, found = jax.lax.optimization_barrier((noise, [f(z) for f, z in firsts]))
        ends = dict(zip(apart, found, strict=True))
    walk = said = None
    if needs.endpoint and (needs.detach_first_step or not needs.full_map):
        walk = rollout(
            student_at,
            schedule,
            noise,
            jnp.asarray(times),
            detach_first_step=needs.detach_first_step,
        )
        context = replace(context, endpoint=walk.end)
        said = first_prediction(walk)

    if needs.student or any(spec.end != "whole" for spec in needs.maps):
        if walk is None:
            held, cond = jax.lax.stop_gradient((student, told))
            x = backward_simulate(step_spec, held, batch._replace(cond=cond), context.step_B)
        else:  # the rollout to the end has been there
            x = select_step(jax.lax.stop_gradient(walk.x), context.step_B)
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
    if needs.full_map:

        def full_map(z):
            walk = rollout(student_at, schedule, z, jnp.asarray(times))
            return walk.end, first_prediction(walk) if needs.first else None

        value, dots = pair(full_map, noise, needs.tangent)
        context = replace(context, full_map=(value[0], dots and dots[0]))
        if walk is None:
            said = value[1]
        if not needs.detach_first_step:
            context = replace(context, endpoint=value[0])
    first = {}
    for spec in needs.first:
        if spec in ends:
            first[spec] = FirstStep(said, ends[spec], jnp.ones_like(context.first_step_weight_B))
        else:
            first[spec] = FirstStep(said, context.maps[spec][0], context.first_step_weight_B)
    return replace(context, first=first)


def first_prediction(walk: Trajectory) -> Prediction:
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
