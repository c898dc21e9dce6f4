"""Backward simulation: the student's own rollout from noise to the start of each drawn step."""

import jax
import jax.numpy as jnp

from gadjax.diffusion.experts import Experts
from gadjax.diffusion.rollout import FreshNoise, rollout
from gadjax.objectives.base import stream_keys
from gadjax.training.state import StepSpec
from gadjax.types import Batch, Params, expand


def stratified_step_indices(stratum_B, n: int):
    """Step indices [B] on a grid of n, spread evenly; neighbours 2j and 2j + 1 get k, n - 1 - k."""
    turn_B, half = stratum_B // 2 % n, (n + 1) // 2
    step_B = jnp.where(turn_B < half, turn_B, n - 1 + half - turn_B)
    return jnp.where(stratum_B % 2, n - 1 - step_B, step_B)


def trained_steps(step_spec: StepSpec) -> tuple[int, int]:
    """First of the student's steps that is trained, and the one after the last."""
    return step_spec.trained_steps or (0, len(step_spec.times) - 1)


def draw_steps(step_spec: StepSpec, batch: Batch):
    """Indices [B] of the drawn steps, spread evenly over those that are trained."""
    first, end = trained_steps(step_spec)
    step_B = stratified_step_indices(batch.stratum, end - first)
    return step_B + first if first else step_B


def select_step(states, step_B):
    """Each sample's state at its drawn step: [n, B, ...] -> [B, ...]."""
    return states[step_B, jnp.arange(len(step_B))]


def draw_grid(step_spec: StepSpec, batch: Batch) -> jax.Array | None:
    """Times [n + 1, B] of a grid drawn anew for every sample; None for the student's own.

    The inner times are uniform between two shares (`StepSpec.redraw`) of the span between the first
    time and the clean end, in falling order.
    """
    if not step_spec.redraw:
        return None
    low, high = step_spec.redraw
    first, *inner, clean = step_spec.times
    keys = stream_keys(batch.key, "grid")
    share_BN = jax.vmap(
        lambda key: jax.random.uniform(key, (len(inner),), minval=low, maxval=high)
    )(keys)
    inner_NB = clean + (first - clean) * jnp.sort(share_BN, axis=1)[:, ::-1].T
    ends = jnp.ones((1, len(keys)))
    return jnp.concatenate([first * ends, inner_NB, clean * ends])


def backward_simulate(
    step_spec: StepSpec, student: Params, batch: Batch, step_B, grid_NB: jax.Array | None = None
):
    """Latents [B, H, W, C] from which each sample's drawn step starts, by rollout from z.

    Neighbours 2j and 2j + 1 need k and a + b - 1 - k evaluations, a to b being the steps that are
    drawn. Where both are on one device, they share a rollout, one after the other: half the cost of
    a rollout for each. Not of experts, each of which would be evaluated on both.

    Args:
      step_spec: grid, rollout, denoiser, and whether neighbours share a device (`can_pair`).
      student: the student's parameters.
      batch: initial noise and conditioning; the conditioning may be a KV cache.
      step_B: drawn step indices [B], as `stratified_step_indices` returns them.
      grid_NB: each sample's own grid, as `draw_grid` returns it; None: the student's.
    """
    first_drawn, end_drawn = trained_steps(step_spec)
    starts, schedule = jnp.asarray(step_spec.times[:end_drawn]), step_spec.denoiser.schedule
    if grid_NB is not None:
        starts = grid_NB[:end_drawn]
    if end_drawn == 1:
        return batch.noise

    def run_steps(x, times, cond, solver):
        def predict(x, t):
            return step_spec.denoiser(student, x, t, cond)

        return rollout(predict, schedule, x, times, solver=solver)

    if isinstance(student, Experts) or not step_spec.can_pair(len(step_B)):
        noise = batch.noise
        trajectory = run_steps(noise, starts, batch.cond, step_spec.solver(noise))
        return select_step(jnp.concatenate([trajectory.x, trajectory.end[None]]), step_B)

    def select_member(index):
        def select(x):
            return x.reshape(-1, 2, *x.shape[1:])[:, index]

        return select(batch.noise), batch.cond.map(select), select(step_B)

    (first, first_cond, first_steps_B), (second, second_cond, _) = (
        select_member(0),
        select_member(1),
    )

    def choose(where_B):
        return lambda a, b: jnp.where(expand(where_B, a), a, b)

    def switch_member(x, finished, now):
        """Keep the first member's latent when it is finished; start from the second's noise."""
        return jax.tree.map(choose(first_steps_B == now), (second, x), (x, finished))

    def step(carry, now):
        x, finished = switch_member(*carry, now)
        index_B = jnp.where(now < first_steps_B, now, now - first_steps_B)
        choose_member = choose(now < first_steps_B)
        solver = step_spec.solver(choose_member(first, second))
        if isinstance(solver, FreshNoise):  # of the step that each sample takes now
            solver = FreshNoise(lambda _, draw=solver.draw: draw(index_B))
        times = starts[jnp.stack([index_B, index_B + 1])]
        end = run_steps(x, times, first_cond.map(choose_member, second_cond), solver).end
        return (end, finished), None

    evaluations = first_drawn + end_drawn - 1  # of both
    carry, _ = jax.lax.scan(step, (first, first), jnp.arange(evaluations))
    second_latent, first_latent = switch_member(*carry, evaluations)
    return jnp.stack([first_latent, second_latent], 1).reshape(batch.noise.shape)
