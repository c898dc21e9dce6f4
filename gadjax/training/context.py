"""Context of an update: every need of the objective's terms, computed once."""

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
    """Context for the terms of an objective; each need is computed once, the teacher's first.

    Args:
      step_spec: denoiser, grid and guidance.
      needs: union of the terms' needs.
      student: the student's parameters, through which gradients flow.
      critic: the critic's parameters; None: the context has no critic.
      teacher: the teacher's parameters; None where nothing uses a teacher.
      batch: one microbatch.
      discriminator: the discriminator's parameters.
    """
    denoiser, schedule, times = step_spec.denoiser, step_spec.denoiser.schedule, step_spec.times
    # A rollout to the end has every sample's first step; a map that other terms need too is
    # computed once, at the drawn step.
    full_rollout = needs.endpoint or needs.full_map
    separate = [spec for spec in needs.first_step if full_rollout and spec not in needs.maps]
    shared = {spec: False for spec in needs.first_step if spec not in separate}
    needs_student = needs.student or bool(needs.first_step and not full_rollout)
    needs = replace(needs, maps=shared | dict(needs.maps), student=needs_student)

    guided = None
    if needs.uses_teacher:
        guided = denoiser.guided_fn(teacher, batch.cond, batch.null, step_spec.guidance)
    # Without a full rollout the drawn step alone is differentiated, and recomputes keys and values
    # with its blocks: kept through the teacher's map and the backward pass, a KV cache costs more
    # memory than it saves work.
    drawn_step_only = needs.uses_teacher and not full_rollout
    student_cond = batch.cond if drawn_step_only else denoiser.cache_text(student, batch.cond)

    def teacher_at(x, t, scale=None):
        if guided and scale is None:
            return guided(x, t)
        scale = step_spec.guidance if scale is None else scale
        return denoiser.guided(teacher, x, t, batch.cond, batch.null, scale)

    def critic_at(x, t, scale=1):
        return denoiser.guided(critic, x, t, batch.cond, batch.null, scale)

    def student_at(x, t):
        return denoiser(student, x, t, student_cond)

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
    noise, separate_ends = batch.noise, {}
    if separate:
        first_maps = (teacher_map(context.at_first_step(), teacher_at, spec) for spec in separate)
        # The teacher has finished before any of the student's residuals wait for reverse mode.
        noise, ends = jax.lax.optimization_barrier((noise, [f(z) for f, z in first_maps]))
        separate_ends = dict(zip(separate, ends, strict=True))
    trajectory = first_prediction = None
    if needs.endpoint and (needs.detach_first_step or not needs.full_map):
        trajectory = rollout(
            student_at,
            schedule,
            noise,
            jnp.asarray(times),
            detach_first_step=needs.detach_first_step,
        )
        context = replace(context, endpoint=trajectory.end)
        first_prediction = prediction_at_first_step(trajectory)

    if needs.student or any(spec.end != "whole" for spec in needs.maps):
        if trajectory is None:
            params, cond = jax.lax.stop_gradient((student, student_cond))
            x = backward_simulate(step_spec, params, batch._replace(cond=cond), context.step_B)
        else:  # the full rollout has passed through these latents
            x = select_step(jax.lax.stop_gradient(trajectory.x), context.step_B)
        context = replace(context, x_BHWC=x)
    maps = {spec: teacher_map(context, teacher_at, spec) for spec in needs.maps}
    v = None
    if needs.tangent:
        v = draw_directions(needs, context, maps)
        context = replace(context, direction_JBHWC=v)

    def value_and_tangents(f, x, with_tangents):
        return tangents(f, x, v) if with_tangents else (f(x), None)

    results = [
        value_and_tangents(*maps[spec], with_tangents) for spec, with_tangents in needs.maps.items()
    ]
    # The teacher has finished here too.
    noise, x, results = jax.lax.optimization_barrier((noise, context.x_BHWC, results))
    context = replace(context, maps=dict(zip(needs.maps, results, strict=True)))
    if needs.student:
        drawn_step = value_and_tangents(lambda x: student_at(x, context.t_B), x, needs.tangent)
        context = replace(context, student=drawn_step)
        first_prediction = first_prediction or drawn_step[0]
    if needs.full_map:

        def full_map(z):
            trajectory = rollout(student_at, schedule, z, jnp.asarray(times))
            return trajectory.end, (
                prediction_at_first_step(trajectory) if needs.first_step else None
            )

        value, dots = value_and_tangents(full_map, noise, needs.tangent)
        context = replace(context, full_map=(value[0], dots and dots[0]))
        if trajectory is None:
            first_prediction = value[1]
        if not needs.detach_first_step:
            context = replace(context, endpoint=value[0])
    first_step = {}
    for spec in needs.first_step:
        if spec in separate_ends:
            first_step[spec] = FirstStep(
                first_prediction, separate_ends[spec], jnp.ones_like(context.first_step_weight_B)
            )
        else:
            first_step[spec] = FirstStep(
                first_prediction, context.maps[spec][0], context.first_step_weight_B
            )
    return replace(context, first_step=first_step)


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
    grid = interpolate_times(start_B, context.map_end(spec), spec.steps)
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
