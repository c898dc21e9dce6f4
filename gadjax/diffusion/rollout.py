"""Probability-flow ODE solvers: student trajectories, teacher maps and sampling.

One scan implements all steps in use, because they are linear: x_next = a x + b x0 + c y. On the ODE
(DDIM, Euler, DPM-Solver++ of order 1 and 2) y is the previous x0; in consistency sampling it is
fresh noise, and a = 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.diffusion.schedules import NoiseSchedule
from gadjax.types import Prediction, expand


class Trajectory(NamedTuple):
    """Trajectory of n ODE steps.

    Args:
      x: states [n, B, H, W, C] at the start of the steps.
      prediction: x0 and eps predicted there, each [n, B, H, W, C].
      end: state after the last step [B, H, W, C].
    """

    x: jax.Array
    prediction: Prediction
    end: jax.Array


class Orders(NamedTuple):
    """Orders of an ODE solver's steps.

    Args:
      order: 1 is DDIM (Song et al. 2021), Euler in a flow schedule, and DPM-Solver++ (Lu et al.
        2022) of order 1: all three are the same step. 2 is DPM-Solver++ 2M in its midpoint form,
        whose first step is of order 1.
      last: order of the last step of order 2 (1 wherever it ends at sigma = 0).
    """

    order: int = 1
    last: int = 1


class FreshNoise(NamedTuple):
    """Consistency sampling in place of the ODE: new noise is added to each predicted x0.

    (Song et al. 2023, algorithm 1.)

    Args:
      draw: index of the step, a scalar or [B] -> standard normal [B, H, W, C].
    """

    draw: Callable[[int | jax.Array], jax.Array]


FIRST_ORDER = Orders()


def coefficients(schedule: NoiseSchedule, times, orders: Orders = FIRST_ORDER):
    """Solver coefficients (a, b, c), each [n, ...], of the n steps between times [n + 1, ...].

    Args:
      schedule: noise schedule.
      times: decreasing times; NumPy or JAX.
      orders: of the solver's steps.
    """
    xp = jnp if isinstance(times, jax.Array) else np
    alpha, sigma = schedule.alpha_sigma(times)
    a = sigma[1:] / sigma[:-1]
    gain = alpha[1:] - a * alpha[:-1]
    if orders.order == 1:
        return a, gain, xp.zeros_like(a)
    floor = np.finfo(np.asarray(a).dtype if xp is np else a.dtype).tiny
    half_log_snr = xp.log(xp.maximum(alpha, floor)) - xp.log(xp.maximum(sigma, floor))
    width = half_log_snr[1:] - half_log_snr[:-1]
    # 1 / (2 r) with r = (previous width) / (this width).
    weight = xp.concatenate([xp.zeros_like(width[:1]), width[1:] / (2 * width[:-1])])
    if orders.last == 1:
        weight = xp.concatenate([weight[:-1], xp.zeros_like(weight[:1])])
    return a, gain * (1 + weight), -gain * weight


def rollout(
    predict: Callable[[jax.Array, jax.Array], Prediction],
    schedule: NoiseSchedule,
    x_BHWC: jax.Array,
    times,
    *,
    solver: Orders | FreshNoise = FIRST_ORDER,
    detach_first_step: bool = False,
) -> Trajectory:
    """Integrate the probability-flow ODE from times[0] to times[n], or sample with fresh noise.

    Args:
      predict: (x_BHWC, t_B or scalar) -> Prediction.
      schedule: noise schedule.
      x_BHWC: state at times[0].
      times: [n + 1], or [n + 1, B] where every sample has its own interval.
      solver: of the ODE, or the noise of the steps in its place.
      detach_first_step: stop gradients (and tangents: jax.jvp of the end with respect to x_BHWC is
        then zero) between the first step's result and the later steps. prediction[0] keeps its
        gradient.
    """
    is_ode = isinstance(solver, Orders)
    if is_ode:
        moves = coefficients(schedule, times, solver)
    else:
        alpha, sigma = schedule.alpha_sigma(times[1:])
        moves = 0 * alpha, alpha, sigma
    a, b, c = (jnp.asarray(v, x_BHWC.dtype) for v in moves)
    starts = jnp.asarray(times[:-1], x_BHWC.dtype)
    detach = jnp.zeros(len(starts), bool).at[0].set(detach_first_step)

    def step(carry, inputs):
        x, previous_x0 = carry
        k, t, a, b, c, detach = inputs
        prediction = predict(x, t)
        y = previous_x0 if is_ode else solver.draw(k)
        x_next = expand(a, x) * x + expand(b, x) * prediction.x0 + expand(c, x) * y
        carry = x_next, prediction.x0
        if detach_first_step:
            carry = jax.tree.map(lambda v: jnp.where(detach, jax.lax.stop_gradient(v), v), carry)
        return carry, (x, prediction)

    start = (x_BHWC, jnp.zeros_like(x_BHWC))
    inputs = (jnp.arange(len(starts)), starts, a, b, c, detach)
    (end, _), (states, predictions) = jax.lax.scan(step, start, inputs)
    return Trajectory(states, predictions, end)


def interpolate_times(start_B, end_B, steps: int):
    """Time grids [steps + 1, B], uniform in t.

    Args:
      start_B, end_B: first and last times.
      steps: number of steps.
    """
    fraction = jnp.linspace(0.0, 1.0, steps + 1, dtype=start_B.dtype)
    return start_B + fraction[:, None] * (end_B - start_B)
