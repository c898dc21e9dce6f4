"""The walks of diffusers' schedulers that are not one of gadjax.rollout's: several steps at once in
PNDM, and steps that add new noise."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.schedules import NoiseSchedule
from gadjax.seeds import GENERATOR
from gadjax.types import Prediction

Predict = Callable[[jax.Array, jax.Array], Prediction]

# Adams and Bashforth's weights of the newest and the three noises before it.
MULTISTEP = np.array([[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0]])
FOURTH = np.array([[55, -59, 37, -9]]) / 24


def plms(predict: Predict, schedule: NoiseSchedule, x_BHWC: jax.Array, times) -> jax.Array:
    """Where n steps of PNDM end that skip its Runge-Kutta part (Liu et al., arXiv:2202.09778).

    times: [n + 1]. Costs n + 1 evaluations, as the first step is taken twice: first to see the
    noise at its end, then with the mean of both noises. One step is DDIM's.
    """
    alpha, sigma = (jnp.asarray(v, x_BHWC.dtype) for v in schedule.alpha_sigma(np.asarray(times)))
    times = jnp.asarray(times, x_BHWC.dtype)
    count = len(times) - 1

    def moved(x, eps, k, to):
        """DDIM's step with the noise that is told."""
        return (alpha[to] / alpha[k]) * (x - sigma[k] * eps) + sigma[to] * eps

    first = predict(x_BHWC, times[0]).eps
    x = moved(x_BHWC, first, 0, 1)
    if count == 1:
        return x
    x = moved(x_BHWC, (first + predict(x, times[1]).eps) / 2, 0, 1)
    weights = np.concatenate([MULTISTEP, np.repeat(FOURTH, max(count - 3, 0), axis=0)])[1:count]
    history = jnp.stack([first, jnp.zeros_like(first), jnp.zeros_like(first)])

    def step(carry, now):
        x, history = carry
        k, weight = now
        history = jnp.concatenate([predict(x, times[k]).eps[None], history])
        x = moved(x, jnp.tensordot(weight, history, 1), k, k + 1)
        return (x, history[:3]), None

    rows = jnp.arange(1, count), jnp.asarray(weights, x.dtype)
    return jax.lax.scan(step, (x, history), rows)[0][0]


def consistency(
    predict: Predict, schedule: NoiseSchedule, x_BHWC: jax.Array, times, *, scaling: float = 0.0
) -> jax.Array:
    """Where steps end that each go to x0 and from there, with new noise, to the next time.

    Consistency models' multistep sampling (Song et al., arXiv:2303.01469, algorithm 1).
    scaling: of LCM's boundary condition (Luo et al., arXiv:2310.04378), c_skip = 1 / (4 s^2 + 1)
      at s = scaling t, which mixes a little of x into x0; 0 leaves it out.
    The new noise of a sample is drawn from its own x_BHWC's bits, so that a picture stays a
    function of the noise it starts from. Derivatives hold it fixed.
    """
    keys = keys_of(x_BHWC)
    for k, (t, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x0 = predict(x_BHWC, jnp.asarray(t, x_BHWC.dtype)).x0
        if scaling:
            square = float(2 * scaling * t) ** 2
            x0 = (square / (square + 1)) ** 0.5 * x0 + x_BHWC / (square + 1)
        if k == len(times) - 2:
            return x0
        alpha, sigma = schedule.alpha_sigma(np.asarray(after))
        x_BHWC = float(alpha) * x0 + float(sigma) * renoise(keys, k, x_BHWC)


def keys_of(x_BHWC: jax.Array) -> jax.Array:
    """A key for each sample, made of its bits."""
    flat = jax.lax.stop_gradient(x_BHWC).astype(jnp.float32).reshape(len(x_BHWC), -1)
    bits = jax.lax.bitcast_convert_type(flat, jnp.uint32)
    odd = 2 * jnp.arange(bits.shape[1], dtype=jnp.uint32) + 1
    key = partial(jax.random.key, impl=GENERATOR)
    return jax.vmap(key)(jnp.sum(bits * odd, axis=1, dtype=jnp.uint32))


def renoise(keys_B: jax.Array, step: int, x_BHWC: jax.Array) -> jax.Array:
    """The noise that step number `step` adds."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B)
    draw = jax.vmap(lambda key: jax.random.normal(key, x_BHWC.shape[1:], jnp.float32))
    return draw(keys).astype(x_BHWC.dtype)
