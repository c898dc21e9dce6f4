"""One-step worlds whose students are functions of the time, for losses with time derivatives."""

import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import D, World

from gadjax.diffusion.schedules import DDPM, Flow
from gadjax.types import Prediction

DEGREE = 6


class Smooth(World):
    """One-step worlds with students that are functions of the time.

    slope: the gaussian's exact flow map, x0 at the end of the ODE; matrix: F = sum_k phi_k(a)
    (matrix_k x_a + bias_k) + bend tanh(x_a + a), phi the Chebyshev polynomials.
    """

    def student(self, params, x, t_B, alpha, sigma, text):
        if "slope" in params:
            away = (x - alpha * params["mean"]) @ params["axes"]
            slope = jnp.sqrt(params["slope"] / (alpha**2 * params["slope"] + sigma**2))
            x0 = params["mean"] + (slope * away) @ params["axes"].T
            return Prediction(x0, (x - alpha * x0) / sigma)
        length, angle = jnp.sqrt(alpha**2 + sigma**2), jnp.arctan2(sigma, alpha)
        phi = jnp.cos(jnp.arange(len(params["matrix"])) * jnp.arccos(4 * angle / jnp.pi - 1))
        x_a = x / length
        f = jnp.einsum("bk,kij,bj->bi", phi, params["matrix"], x_a) + phi @ params["bias"]
        f = f + params["bend"] * jnp.tanh(x_a + angle)
        cos, sin = alpha / length, sigma / length
        return Prediction((cos * x_a - sin * f) / length, (sin * x_a + cos * f) / length)


WORLDS = {kind: Smooth(DDPM(), kind, (899.0, -1.0)) for kind in ("eps", "v", "x0")}
WORLDS["flow"] = Smooth(Flow(), "flow", (1000.0, 0.0))
all_worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def smooth_params(scale=0.0, seed=1, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"matrix": (DEGREE, D, D), "bias": (DEGREE, D), "bend": (D,)}
    return {k: jnp.asarray(scale * rng.normal(size=v), dtype) for k, v in shapes.items()}


def trig_velocity(world, params, cond):
    """F of (x_a, a), as a TrigFlow network's; of the flow, whose time is a formula of the angle."""

    def velocity(x_a, a):
        cos, sin = jnp.cos(a), jnp.sin(a)
        t, length = 1000 * sin / (cos + sin), 1 / (cos + sin)
        x = length[:, None, None, None] * x_a
        pred = world.denoiser(params, x, t, cond)
        cos, sin = cos[:, None, None, None], sin[:, None, None, None]
        return cos * pred.eps - sin * pred.x0

    return velocity
