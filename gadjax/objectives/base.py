"""What an objective term may ask for, and what it is handed."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import jax
import jax.numpy as jnp

from gadjax.denoiser import Denoiser
from gadjax.errors import InputError
from gadjax.types import Batch, Metrics, Prediction


@dataclass(frozen=True)
class TeacherMap:
    """The teacher's guided ODE from a drawn step's own time, in `steps` DDIM/Euler steps.

    end: "next" (the following time of the student's grid) or "clean".
    """

    end: str = "next"
    steps: int = 4

    def __post_init__(self):
        if self.end not in ("next", "clean"):
            raise InputError(f"objective: found end {self.end!r}; expected 'next' or 'clean'")
        if self.steps < 1:
            raise InputError(f"objective: found a map of {self.steps} steps; expected 1 or more")


@dataclass(frozen=True)
class Needs:
    """What a term asks of the training step; the step meets each need once, whoever asks.

    student: the student at its drawn step, with gradient.
    tangent: the direction v for which the student's and the maps' tangents are wanted, or None.
    maps: teacher maps -> whether their tangent along v is wanted too.
    endpoint: a whole student rollout from z, with gradient through every step.
    critic: the term reads the critic, which must then be trained.
    cut_first: the first step belongs to another term: no base gradient may pass it.
    images: clean latents from the data.
    """

    student: bool = False
    tangent: str | None = None
    maps: Mapping[TeacherMap, bool] = field(default_factory=dict)
    endpoint: bool = False
    critic: bool = False
    cut_first: bool = False
    images: bool = False

    def __or__(self, other: "Needs") -> "Needs":
        if self.tangent and other.tangent and self.tangent != other.tangent:
            raise InputError(
                f"objective: found directions {self.tangent!r} and {other.tangent!r}; "
                "expected one for all terms"
            )
        maps = dict(self.maps)
        for spec, tangent in other.maps.items():
            maps[spec] = maps.get(spec, False) or tangent
        either = {
            name: getattr(self, name) or getattr(other, name)
            for name in ("student", "endpoint", "critic", "cut_first", "images")
        }
        return Needs(tangent=self.tangent or other.tangent, maps=maps, **either)


@dataclass(frozen=True)
class Context:
    """One batch as the terms see it.

    Every array with a trailing _B has one entry per sample. step_B is the drawn place on the
    student's grid, x_BHWC the student's own (gradient-free) latent there, t_B and next_B the
    times it goes from and to. `student` and `maps` are what Needs asked for, each a
    (value, tangent) pair where the tangent is None unless it was asked for; `endpoint` is the x0
    at which the student's whole rollout ends.
    """

    denoiser: Denoiser
    batch: Batch
    times: tuple[float, ...]
    teacher: Callable[[jax.Array, jax.Array], Prediction]
    critic: Callable[[jax.Array, jax.Array], Prediction] | None = None
    critic_params: object = None
    student_params: object = None
    step_B: jax.Array | None = None
    x_BHWC: jax.Array | None = None
    direction_BHWC: jax.Array | None = None
    student: tuple[Prediction, Prediction | None] | None = None
    maps: Mapping[TeacherMap, tuple[jax.Array, jax.Array | None]] = field(default_factory=dict)
    endpoint: jax.Array | None = None
    cut_first: bool = False
    stream: str = ""

    @cached_property
    def t_B(self):
        return jnp.asarray(self.times, jnp.float32)[self.step_B]

    @cached_property
    def next_B(self):
        return jnp.asarray(self.times, jnp.float32)[self.step_B + 1]

    @property
    def schedule(self):
        return self.denoiser.schedule

    @cached_property
    def base_B(self):
        """Weight of each sample in a base objective: where the first step is somebody else's,
        0 there and n / (n - 1) elsewhere, so that the mean over B is the mean over the others."""
        if not self.cut_first:
            return jnp.ones(self.batch.noise.shape[0], jnp.float32)
        n = len(self.times) - 1
        return (self.step_B > 0) * jnp.float32(n / (n - 1))

    @cached_property
    def first_B(self):
        """Weight of each sample in a term about the first step alone."""
        return (self.step_B == 0) * jnp.float32(len(self.times) - 1)

    def named(self, name: str) -> "Context":
        """The same context with random numbers of its own, so that terms do not share draws."""
        return replace(self, stream=f"{self.stream}/{name}")

    def _keys(self, name: str):
        return stream_keys(self.batch.key, f"{self.stream}/{name}")

    def normal(self, name: str):
        """Standard normal [B, H, W, C], a function of each sample's key and the name alone."""
        shape = self.batch.noise.shape[1:]
        return jax.vmap(lambda k: jax.random.normal(k, shape))(self._keys(name))

    def uniform(self, name: str):
        """Uniform [0, 1) per sample [B]."""
        return jax.vmap(jax.random.uniform)(self._keys(name))


def stream_keys(keys_B, name: str):
    """An independent key per sample for the named use."""
    number = zlib.crc32(name.encode())
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)


class Term(Protocol):
    """An objective. A weighted sum of terms is again a term."""

    @property
    def needs(self) -> Needs: ...

    def __call__(self, context: Context) -> tuple[jax.Array, Metrics]:
        """Per-sample loss [B] in float32, and scalars to look at."""

    def critic_loss(self, context: Context) -> jax.Array:
        """Per-sample loss [B] of the critic; only of terms whose needs name the critic."""


def sample_mean(x):
    """Mean over all but the first axis: [B]."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
