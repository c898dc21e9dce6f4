"""The three lines that distribution-matching losses share."""

import jax
import jax.numpy as jnp

from gadjax.objectives.base import sample_mean
from gadjax.schedules import expand

sg = jax.lax.stop_gradient


def pseudo_loss(x, gradient, norm_B, huber: float = 0.0):
    """A per-sample loss [B] whose gradient with respect to x is gradient / norm_B / numel.

    huber: with c > 0, sqrt(d^2 + c^2) - c of the difference instead of half its square, as the
      released TDM script has it: the gradient's direction elementwise, its size saturated at c.
    """
    if huber:
        difference = x - sg(x - gradient)
        return sample_mean(jnp.sqrt(difference**2 + huber**2) - huber) / norm_B
    difference = x - sg(x - gradient / expand(norm_B, x))
    return 0.5 * sample_mean(difference**2)


def mean_abs(x, floor: float = 1e-4):
    """mean |x| per sample [B], without gradient; the floor keeps 1 / mean |x| finite."""
    return jnp.maximum(sg(sample_mean(jnp.abs(x))), floor)
