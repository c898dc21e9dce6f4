"""Directions in noise space and exact Jacobian-vector products along them (for GAD)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gadjax.errors import InputError, check_choice
from gadjax.ops.attention import tangent_pass
from gadjax.types import expand

GRID_SIDE = 4  # cells a side of the grid on which low-frequency noise is constant


@dataclass(frozen=True)
class Directions:
    """Distribution of the directions v along which tangents J v are taken.

    All kinds have E |v|^2 = the number of elements.

    Args:
      kind: "gaussian" or "rademacher", with E[v v^T] = I, for which E |J v|^2 = |J|_F^2 (Hutchinson
        1990); "low_frequency", Gaussian noise that is constant on each of 4 x 4 cells, to which
        layout responds; or "control", the gradient of a random low-frequency functional of the
        teacher's output with respect to its input: the direction in which the teacher changes that
        functional most (`count` functionals).
      count: number of directions for every sample.
      one_in: k, 1 or more: of every k neighbouring samples one has tangents (`Blocks`).

    Raises: InputError for another kind or a count below 1.
    """

    kind: str = "gaussian"
    count: int = 1
    one_in: int = 1

    def __post_init__(self):
        check_choice("direction", self.kind, (*DISTRIBUTIONS, "control"))
        if self.count < 1:
            raise InputError(f"directions: found {self.count}; expected 1 or more")


class Blocks(NamedTuple):
    """Blocks of k neighbouring samples, of each of which one is chosen: N = B / k.

    The mean of `spread` over B is the mean over N, and in expectation over the choice what it would
    be if all were chosen. Neighbours, so that every device chooses among the samples that it has.

    Args:
      size: k, 2 or more.
      index_N: the chosen sample of each block, from 0 to k - 1.
    """

    size: int
    index_N: jax.Array

    def chosen(self, x):
        """The chosen samples [N, ...] of an array [B, ...]."""
        x = self._split(x)
        chosen = x[:, 0]
        for place in range(1, self.size):
            chosen = self._where(self.index_N == place, x[:, place], chosen)
        return chosen

    def rest(self, x):
        """The other samples [B - N, ...] of an array [B, ...]."""
        x = self._split(x)
        after = jnp.arange(self.size - 1) >= self.index_N[:, None]
        return self._join_blocks(self._where(after, x[:, 1:], x[:, :-1]))

    def join(self, chosen, rest):
        """[B, ...] of what `chosen` and `rest` return."""
        rest = rest.reshape(-1, self.size - 1, *rest.shape[1:])
        before, after = (
            jnp.concatenate(parts, 1) for parts in ((rest, rest[:, -1:]), (rest[:, :1], rest))
        )
        place, index = jnp.arange(self.size), self.index_N[:, None]
        others = self._where(place < index, before, after)
        return self._join_blocks(self._where(place == index, chosen[:, None], others))

    def spread(self, loss_N):
        """Loss [B] of a loss of the chosen samples: k times theirs, 0 for the others."""
        return self.join(self.size * loss_N, jnp.zeros(len(loss_N) * (self.size - 1), loss_N.dtype))

    def _split(self, x):
        return x.reshape(-1, self.size, *x.shape[1:])

    @staticmethod
    def _join_blocks(x):
        return x.reshape(-1, *x.shape[2:])

    @staticmethod
    def _where(condition, x, other):
        return jnp.where(expand(condition, x), x, other)


def draw_blocks(size: int, keys_B: jax.Array) -> Blocks:
    """Blocks of `size` neighbours, one of each drawn with the key of its first sample.

    Args:
      size: k, 2 or more, a divisor of the number of keys.
      keys_B: PRNG keys.
    """
    keys_N = keys_B[::size]
    return Blocks(size, jax.vmap(lambda key: jax.random.randint(key, (), 0, size))(keys_N))


def low_frequency(key, shape: tuple[int, ...], dtype=jnp.float32):
    """Low-frequency noise: standard normal, constant on each of GRID_SIDE x GRID_SIDE cells.

    Args:
      key: PRNG key.
      shape: (H, W, C) of the result.
      dtype: of the result.
    """
    height, width, channels = shape
    cells = [jnp.arange(side) * min(GRID_SIDE, side) // side for side in (height, width)]
    coarse = jax.random.normal(
        key, (min(GRID_SIDE, height), min(GRID_SIDE, width), channels), dtype
    )
    return coarse[cells[0][:, None], cells[1][None, :]]


DISTRIBUTIONS = {
    "gaussian": jax.random.normal,
    "rademacher": jax.random.rademacher,
    "low_frequency": low_frequency,
}


def directions(spec: Directions, keys_B: jax.Array, shape: tuple[int, ...], dtype=jnp.float32):
    """Draw J = spec.count random directions for each sample; not for "control".

    Args:
      spec: distribution and count.
      keys_B: PRNG keys.
      shape: of one sample.
      dtype: of the directions.

    Returns: directions [J, B, *shape].
    """

    def draw(key):
        keys = jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(spec.count))
        return jax.vmap(lambda k: DISTRIBUTIONS[spec.kind](k, shape, dtype))(keys)

    return jax.vmap(draw, out_axes=1)(keys_B)


def control_directions(f: Callable, x: jax.Array, keys_B: jax.Array, count: int):
    """Gradients of x -> <w, f(x)> for low-frequency noise w, each of norm sqrt(D), D = H W C.

    Args:
      f: acts on each sample independently, [B, H, W, C] -> [B, H, W, C].
      x: where the gradients are taken.
      keys_B: PRNG keys.
      count: number J of functionals.

    Returns: directions [J, B, H, W, C].
    """
    w = directions(Directions("low_frequency", count), keys_B, x.shape[1:], x.dtype)
    _, vjp = jax.vjp(f, x)
    v = jax.vmap(lambda w: vjp(w)[0])(w)
    axes = tuple(range(2, v.ndim))
    return v * jax.lax.rsqrt(jnp.mean(v**2, axis=axes, keepdims=True) + jnp.finfo(v.dtype).tiny)


def tangent(f: Callable, x: Any, v: Any):
    """Jacobian-vector product: (f(x), J_f(x) v) in one forward pass; both are differentiable in
    reverse mode.

    Attention inside uses the implementation with an efficient tangent (gadjax.ops.attention); an f
    that itself takes gradients of a network needs jax.jvp instead.

    Args:
      f: function of one array or tree.
      x, v: point and direction.
    """
    with tangent_pass(True):
        return jax.jvp(f, (x,), (v,))


def tangents(f: Callable, x: jax.Array, v_J: jax.Array):
    """Jacobian-vector products along J directions; f(x) is evaluated once.

    Args:
      f: function of one array.
      x: point.
      v_J: directions [J, *x.shape].

    Returns: (f(x), tangents [J, ...]).
    Raises: InputError for directions of another shape.
    """
    if v_J.shape[1:] != x.shape:
        raise InputError(
            f"directions: found shape {v_J.shape}; expected (J, {', '.join(map(str, x.shape))})"
        )
    if len(v_J) == 1:
        value, derivative = tangent(f, x, v_J[0])
        return value, jax.tree.map(lambda d: d[None], derivative)
    # The primal is not mapped over, so it is computed once for all directions.
    return jax.vmap(lambda v: tangent(f, x, v), out_axes=(None, 0))(v_J)
