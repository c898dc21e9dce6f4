"""Walking the probability-flow ODE: student trajectories, teacher maps and plain sampling.

One scan serves them all, because the deterministic steps in use (DDIM, Euler, DPM-Solver++ of
order 1 and 2) are all linear: x_next = a x + b x0 + c x0_previous.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.diffusion.schedules import NoiseSchedule
from gadjax.types import Prediction, expand


class Trajectory(NamedTuple):
    """x: the states [n, B, H, W, C] that the n steps started from; prediction: what each said;
    end: where the last step arrived."""

    x: jax.Array
    prediction: Prediction
    end: jax.Array


def coefficients(schedule: NoiseSchedule, times, order: int = 1, last_order: int = 1):
    """a, b, c [n, ...] of the n steps between times [n + 1, ...].

    Order 1 is DDIM (Song et al. 2021), Euler in a flow schedule, and DPM-Solver++ (Lu et al. 2022)
    of order 1: all three are the same step. Order 2 is DPM-Solver++ 2M in its midpoint form; its
    first step is of order 1, and its last one of `last_order` (1 wherever it ends at sigma = 0).
    """
    xp = jnp if isinstance(times, jax.Array) else np
    alpha, sigma = schedule.alpha_sigma(times)
    a = sigma[1:] / sigma[:-1]
    reach = alpha[1:] - a * alpha[:-1]
    if order == 1:
        return a, reach, xp.zeros_like(a)
    floor = np.finfo(np.asarray(a).dtype if xp is np else a.dtype).tiny
    half_log_snr = xp.log(xp.maximum(alpha, floor)) - xp.log(xp.maximum(sigma, floor))
    width = half_log_snr[1:] - half_log_snr[:-1]
    # 1 / (2 r) with r = (the previous width) / (this width).
    weight = xp.concatenate([xp.zeros_like(width[:1]), width[1:] / (2 * width[:-1])])
    if last_order == 1:
        weight = xp.concatenate([weight[:-1], xp.zeros_like(weight[:1])])
    return a, reach * (1 + weight), -reach * weight


def rollout(
    predict: Callable[[jax.Array, jax.Array], Prediction],
    schedule: NoiseSchedule,
    x_BHWC: jax.Array,
    times,
    *,
    order: int = 1,
    last_order: int = 1,
    detach_first_step: bool = False,
) -> Trajectory:
    """Walk from times[0] to times[n].

    predict: (x_BHWC, t_B or scalar) -> Prediction.
    times: [n + 1], or [n + 1, B] where every sample walks its own interval.
    detach_first_step: no gradient passes from the second step on into what the first one returned
      (nor does a tangent: jax.jvp of a cut walk with respect to x_BHWC is zero). What
      prediction[0] says keeps its gradient.
    """
    a, b, c = (
        jnp.asarray(v, x_BHWC.dtype) for v in coefficients(schedule, times, order, last_order)
    )
    starts = jnp.asarray(times[:-1], x_BHWC.dtype)
    cut = jnp.zeros(len(starts), bool).at[0].set(detach_first_step)

    def step(carry, now):
        x, before = carry
        t, a, b, c, cut = now
        said = predict(x, t)
        after = expand(a, x) * x + expand(b, x) * said.x0 + expand(c, x) * before
        kept = after, said.x0
        if detach_first_step:
            kept = jax.tree.map(lambda v: jnp.where(cut, jax.lax.stop_gradient(v), v), kept)
        return kept, (x, said)

    start = (x_BHWC, jnp.zeros_like(x_BHWC))
    (end, _), (states, predictions) = jax.lax.scan(step, start, (starts, a, b, c, cut))
    return Trajectory(states, predictions, end)


def interpolate_times(start_B, end_B, steps: int):
    """steps + 1 times from start_B to end_B, even in t: [steps + 1, B]."""
    share = jnp.linspace(0.0, 1.0, steps + 1, dtype=start_B.dtype)
    return start_B + share[:, None] * (end_B - start_B)
