"""Directions in noise space and exact derivatives along them: what GAD is made of."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gadjax.errors import InputError


def directions(kind: str, keys_B: jax.Array, shape: tuple[int, ...], dtype=jnp.float32):
    """One random direction per sample, [B, *shape], with E[v v^T] = I.

    Either kind makes E |J v|^2 = |J|_F^2 (Hutchinson 1990).
    kind: "gaussian" or "rademacher". Raises InputError for another.
    """
    draw = {"gaussian": jax.random.normal, "rademacher": jax.random.rademacher}
    if kind not in draw:
        raise InputError(f"direction: found {kind!r}; expected {' or '.join(sorted(draw))}")
    return jax.vmap(lambda key: draw[kind](key, shape, dtype))(keys_B)


def tangent(f: Callable, x: jax.Array, v: jax.Array):
    """f(x) and J_f(x) v in one forward pass; reverse mode goes through both."""
    return jax.jvp(f, (x,), (v,))
