"""Directions in noise space and exact derivatives along them: what GAD is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.ops.attention import tangent_pass

CELLS = 4  # a side of the grid on which low-frequency noise is constant


@dataclass(frozen=True)
class Directions:
    """Along which v the tangents J v are taken, `count` of them for every sample.

    kind: "gaussian" or "rademacher", with E[v v^T] = I, for which E |J v|^2 = |J|_F^2 (Hutchinson
      1990); "low_frequency", gaussian noise that is constant on each of 4 x 4 cells, to which
      layout answers; or "control", the gradient of a random low-frequency functional of where the
      teacher's map leads, the move by which the teacher would change that functional most
      (`count` functionals). All have E |v|^2 = the number of elements.
    Raises InputError for another kind or a count below 1.
    """

    kind: str = "gaussian"
    count: int = 1

    def __post_init__(self):
        if self.kind not in (*DRAWS, "control"):
            raise InputError(
                f"direction: found {self.kind!r}; expected one of {', '.join(DRAWS)}, control"
            )
        if self.count < 1:
            raise InputError(f"directions: found {self.count}; expected 1 or more")


def low_frequency(key, shape: tuple[int, ...], dtype=jnp.float32):
    """Standard normal [H, W, C] that is constant on each of CELLS x CELLS cells."""
    height, width, channels = shape
    cells = [jnp.arange(side) * min(CELLS, side) // side for side in (height, width)]
    coarse = jax.random.normal(key, (min(CELLS, height), min(CELLS, width), channels), dtype)
    return coarse[cells[0][:, None], cells[1][None, :]]


DRAWS = {
    "gaussian": jax.random.normal,
    "rademacher": jax.random.rademacher,
    "low_frequency": low_frequency,
}


def directions(spec: Directions, keys_B: jax.Array, shape: tuple[int, ...], dtype=jnp.float32):
    """spec.count random directions for each sample: [J, B, *shape]. Not for "control"."""

    def draw(key):
        keys = jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(spec.count))
        return jax.vmap(lambda k: DRAWS[spec.kind](k, shape, dtype))(keys)

    return jax.vmap(draw, out_axes=1)(keys_B)


def control_directions(f: Callable, x: jax.Array, keys_B: jax.Array, count: int):
    """The gradients [J, B, ...] of x -> <w, f(x)>, w low-frequency noise, each of norm sqrt(D).

    f maps every sample by itself, [B, H, W, C] -> [B, H, W, C].
    """
    w = directions(Directions("low_frequency", count), keys_B, x.shape[1:], x.dtype)
    _, pull = jax.vjp(f, x)
    v = jax.vmap(lambda w: pull(w)[0])(w)
    axes = tuple(range(2, v.ndim))
    return v * jax.lax.rsqrt(jnp.mean(v**2, axis=axes, keepdims=True) + jnp.finfo(v.dtype).tiny)


def tangent(f: Callable, x: Any, v: Any):
    """f(x) and J_f(x) v in one forward pass, of arrays or trees; reverse mode goes through both.

    Attention inside is the one that has an efficient tangent (gadjax.ops.attention); an f that
    itself takes gradients of a network needs jax.jvp instead.
    """
    with tangent_pass(True):
        return jax.jvp(f, (x,), (v,))


def tangents(f: Callable, x: jax.Array, v_J: jax.Array):
    """f(x) once, and J_f(x) v_j for J directions [J, *x.shape]: (f(x), [J, ...]).

    Raises InputError for directions of another shape.
    """
    if v_J.shape[1:] != x.shape:
        raise InputError(
            f"directions: found shape {v_J.shape}; expected (J, {', '.join(map(str, x.shape))})"
        )
    if len(v_J) == 1:
        value, dot = tangent(f, x, v_J[0])
        return value, jax.tree.map(lambda d: d[None], dot)
    # The primal is not mapped over, so it is computed once for all directions.
    return jax.vmap(lambda v: tangent(f, x, v), out_axes=(None, 0))(v_J)
