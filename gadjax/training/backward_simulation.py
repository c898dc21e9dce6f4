"""Where each sample's own walk from its noise starts the step that is drawn for it."""

import jax
import jax.numpy as jnp

from gadjax.diffusion.rollout import rollout
from gadjax.training.state import StepSpec
from gadjax.types import Batch, Params, expand


def stratified_step_indices(stratum_B, n: int):
    """Steps of a grid of n, spread evenly; neighbours 2j and 2j + 1 have k and n - 1 - k."""
    turn_B, half = stratum_B // 2 % n, (n + 1) // 2
    step_B = jnp.where(turn_B < half, turn_B, n - 1 + half - turn_B)
    return jnp.where(stratum_B % 2, n - 1 - step_B, step_B)


def select_step(states, step_B):
    """Of states [n, B, ...] each sample's at its own step."""
    return states[step_B, jnp.arange(len(step_B))]


def backward_simulate(step_spec: StepSpec, student: Params, batch: Batch, step_B):
    """The latent [B, H, W, C] at which each sample's own rollout from z starts its step.

    Two neighbours, who need k and n - 1 - k evaluations, take turns in one walk of n - 1, where
    each device has both: half of what a walk for each would cost.
    """
    starts, schedule = jnp.asarray(step_spec.times[:-1]), step_spec.denoiser.schedule
    n = len(starts)
    if n == 1:
        return batch.noise

    def walk(x, times, cond):
        return rollout(lambda x, t: step_spec.denoiser(student, x, t, cond), schedule, x, times)

    if not step_spec.can_pair(len(step_B)):
        found = walk(batch.noise, starts, batch.cond)
        return select_step(jnp.concatenate([found.x, found.end[None]]), step_B)

    def member(which):
        def one(x):
            return x.reshape(-1, 2, *x.shape[1:])[:, which]

        return one(batch.noise), batch.cond.map(one), one(step_B)

    (first, first_cond, arrival_B), (second, second_cond, _) = member(0), member(1)

    def choose(one_B):
        return lambda a, b: jnp.where(expand(one_B, a), a, b)

    def turn(x, arrived, now):
        return jax.tree.map(choose(arrival_B == now), (second, x), (x, arrived))

    def step(carry, now):
        x, arrived = turn(*carry, now)
        place_B = jnp.where(now < arrival_B, now, now - arrival_B)
        cond = first_cond.map(choose(now < arrival_B), second_cond)
        return (walk(x, starts[jnp.stack([place_B, place_B + 1])], cond).end, arrived), None

    carry, _ = jax.lax.scan(step, (first, first), jnp.arange(n - 1))
    of_second, of_first = turn(*carry, n - 1)
    return jnp.stack([of_first, of_second], 1).reshape(batch.noise.shape)
