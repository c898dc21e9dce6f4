"""Workspace of a context under construction, and tangents of all or of some of its samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gadjax.diffusion.geometry import Blocks, control_directions, directions, draw_blocks, tangents
from gadjax.diffusion.rollout import Trajectory, interpolate_times, rollout
from gadjax.objectives.base import Context, Needs, TeacherMap, map_end, stream_keys
from gadjax.objectives.common import part_of
from gadjax.training.state import StepSpec
from gadjax.types import Batch, Cond, Params, Prediction


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


def teacher_of(
    step_spec: StepSpec, needs: Needs, roles: Roles, batch: Batch
) -> Callable[..., Prediction]:
    """`Context.teacher` of a batch; at the run's guidance its evaluations share one KV cache."""
    denoiser, params, null = step_spec.denoiser, roles.teacher, batch.null
    guided, read = None, batch.override or batch.cond
    if needs.uses_teacher:
        guided = denoiser.guided_fn(params, read, null, step_spec.guidance)

    def teacher_at(x, t, scale=None):
        if guided and scale is None:
            return guided(x, t)
        scale = step_spec.guidance if scale is None else scale
        return denoiser.guided(params, x, t, read, null, scale)

    return teacher_at


def tangent_blocks(needs: Needs, batch: Batch) -> Blocks | None:
    """Which samples have tangents; None: all of them."""
    if needs.tangent is None or needs.tangent.one_in == 1:
        return None
    return draw_blocks(needs.tangent.one_in, stream_keys(batch.key, "blocks"))


def part_of_workspace(work: Workspace, pick: Callable) -> Workspace:
    """Workspace of some samples of an update.

    Args:
      work: of all of them.
      pick: [B, ...] -> their rows.
    """
    noise, x = jax.tree.map(pick, (work.noise, work.x))
    # Its teacher reads other prompts: `walk` makes one where it is needed.
    context = replace(part_of(work.context, pick), teacher=None)
    return replace(work, context=context, cond=work.cond.map(pick), noise=noise, x=x)


def value_and_tangents(work: Workspace, make: Callable, with_value: bool, with_tangents: bool):
    """Values [B, ...] of a function of every sample, and its tangents [J, N, ...] or None.

    Tangents are of the samples that the context's `blocks` choose. Those and the others are
    evaluated separately, and the others not at all without `with_value`: the values are then None.

    Args:
      work: all samples.
      make: workspace -> the function, [B, ...] -> [B, ...], and its inputs.
      with_value: whether the values are needed.
      with_tangents: whether the tangents are, along the context's directions.
    """
    blocks, direction_JNHWC = work.context.blocks, work.context.direction_JNHWC
    if not with_tangents:
        f, x = make(work)
        return f(x), None
    if not blocks:
        return tangents(*make(work), direction_JNHWC)
    chosen, tangents_JN = tangents(*make(part_of_workspace(work, blocks.chosen)), direction_JNHWC)
    if not with_value:
        return None, tangents_JN
    f, x = make(part_of_workspace(work, blocks.rest))
    return jax.tree.map(blocks.join, chosen, f(x)), tangents_JN


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
    steps = spec.count(len(context.times) - 1)
    grid = interpolate_times(start_B, map_end(context, spec), steps)
    return (lambda x: rollout(teacher, context.schedule, x, grid).end), x


def walk(work: Workspace, spec: TeacherMap):
    """`teacher_map` of all samples, or of those of a part."""
    context = work.context
    teacher = context.teacher or teacher_of(work.step_spec, work.needs, work.roles, context.batch)
    return teacher_map(context, teacher, spec)


def draw_directions(work: Workspace):
    """Directions [J, N, H, W, C] shared by all tangents of an update.

    Args:
      work: of the N samples; kind "control" uses the first map that has tangents.
    """
    needs, context = work.needs, work.context
    noise = context.batch.noise
    keys = stream_keys(context.batch.key, "direction")
    if needs.tangent.kind != "control":
        return directions(needs.tangent, keys, noise.shape[1:], noise.dtype)
    f, x = walk(work, needs.map_tangents[0])
    return jax.lax.stop_gradient(control_directions(f, x, keys, needs.tangent.count))
