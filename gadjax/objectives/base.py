"""What an objective term may ask for, and what it is handed."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.geometry import Directions
from gadjax.errors import InputError
from gadjax.types import Batch, Metrics, Prediction


@dataclass(frozen=True)
class TeacherMap:
    """The teacher's guided ODE in `steps` DDIM/Euler steps.

    end: from a drawn step's own latent and time to "next" (the following time of the student's
      grid) or "clean"; or "whole", from the initial noise z to the clean end.
    until: with "next", the time at which it ends where the drawn step is the first.
    """

    end: str = "next"
    steps: int = 4
    until: float | None = None

    def __post_init__(self):
        if self.end not in ("next", "clean", "whole"):
            raise InputError(
                f"objective: found end {self.end!r}; expected 'next', 'clean' or 'whole'"
            )
        if self.steps < 1:
            raise InputError(f"objective: found a map of {self.steps} steps; expected 1 or more")


@dataclass(frozen=True)
class Needs:
    """What a term asks of the training step; the step meets each need once, whoever asks.

    student: the student at its drawn step, with gradient.
    first: teacher maps from z at the first time; the student's prediction there, with gradient,
      comes with each. Of all samples where the student's walk to the end is there, as `endpoint`
      and `whole` have it, and no other term wants the map; else of those whose drawn step is the
      first, which share the drawn step and its maps with other terms.
    whole: the student's whole few-step map from z, with gradient through every step, no cut.
    tangent: the directions along which the tangents of these two and of the maps are wanted.
    maps: teacher maps -> whether their tangents are wanted too.
    teacher: the term reads the teacher itself.
    jvp: the term takes forward derivatives of a network itself.
    endpoint: where the student's whole rollout ends, cut where `detach_first_step` says so.
    critic: the term reads the critic, which must then be trained.
    discriminator: the term reads the discriminator, which must then be trained.
    detach_first_step: the first step belongs to another term: no base gradient may pass it.
    images: clean latents from the data.
    """

    student: bool = False
    first: tuple[TeacherMap, ...] = ()
    full_map: bool = False
    tangent: Directions | None = None
    maps: Mapping[TeacherMap, bool] = field(default_factory=dict)
    teacher: bool = False
    jvp: bool = False
    endpoint: bool = False
    critic: bool = False
    discriminator: bool = False
    detach_first_step: bool = False
    images: bool = False

    @property
    def uses_teacher(self) -> bool:
        """Whether there is a teacher in it at all; plain denoising has none."""
        return bool(self.maps or self.first) or self.teacher or self.critic or self.discriminator

    def __or__(self, other: "Needs") -> "Needs":
        if self.tangent and other.tangent and self.tangent != other.tangent:
            raise InputError(
                f"objective: found directions {_spelt(self.tangent)} and "
                f"{_spelt(other.tangent)}; expected one choice for all terms"
            )
        maps = dict(self.maps)
        for spec, tangent in other.maps.items():
            maps[spec] = maps.get(spec, False) or tangent
        either = {
            f.name: getattr(self, f.name) or getattr(other, f.name)
            for f in fields(self)
            if f.type is bool
        }
        first = tuple(dict.fromkeys(self.first + other.first))
        return Needs(tangent=self.tangent or other.tangent, maps=maps, first=first, **either)


def _spelt(directions: Directions) -> str:
    return f"{directions.count} x {directions.kind!r}"


class FirstStep(NamedTuple):
    """Beside a teacher's map from z: what the student says at z, where the map ends [B, H, W, C],
    and the weight [B] of each sample, by which the mean over B is one over the samples that have
    all this. The others' numbers are finite and mean nothing."""

    said: Prediction
    arrived: jax.Array
    weight_B: jax.Array


@dataclass(frozen=True)
class Context:
    """One batch as the terms see it.

    Every array with a trailing _B has one entry per sample. step_B is the drawn place on the
    student's grid, x_BHWC the student's own (gradient-free) latent there, t_B and next_B the
    times it goes from and to. `student`, `whole` and `maps` are what Needs asked for, each a
    (value, tangents) pair where the tangents [J, B, ...] are None unless they were asked for;
    `first` has a First for each of its maps; `endpoint` is the x0 at which the student's whole
    rollout ends.
    teacher and critic: (x_BHWC, t_B, scale) -> Prediction; the scale is the run's `guidance` for
    the teacher and 1 for the critic unless it is given. Gradients pass their inputs.
    """

    denoiser: Denoiser
    batch: Batch
    times: tuple[float, ...]
    guidance: float
    teacher: Callable[..., Prediction]
    critic: Callable[..., Prediction] | None = None
    teacher_params: object = None
    critic_params: object = None
    student_params: object = None
    discriminator_params: object = None
    step_B: jax.Array | None = None
    x_BHWC: jax.Array | None = None
    direction_JBHWC: jax.Array | None = None
    student: tuple[Prediction, Prediction | None] | None = None
    first: Mapping[TeacherMap, FirstStep] = field(default_factory=dict)
    full_map: tuple[jax.Array, jax.Array | None] | None = None
    maps: Mapping[TeacherMap, tuple[jax.Array, jax.Array | None]] = field(default_factory=dict)
    endpoint: jax.Array | None = None
    detach_first_step: bool = False
    stream: str = ""

    @cached_property
    def t_B(self):
        return jnp.asarray(self.times, jnp.float32)[self.step_B]

    @cached_property
    def next_B(self):
        return jnp.asarray(self.times, jnp.float32)[self.step_B + 1]

    def map_end(self, spec: TeacherMap):
        """The times at which a teacher map ends, per sample."""
        if spec.end != "next":
            return jnp.full_like(self.t_B, self.schedule.clean)
        if spec.until is None:
            return self.next_B
        return jnp.where(self.step_B == 0, spec.until, self.next_B)

    def at_first_step(self) -> "Context":
        """The same context with every sample at the first step, whose latent is z."""
        return replace(self, step_B=jnp.zeros_like(self.step_B), x_BHWC=self.batch.noise)

    @property
    def schedule(self):
        return self.denoiser.schedule

    @cached_property
    def base_weight_B(self):
        """Weight of each sample in a base objective: where the first step is somebody else's,
        0 there and n / (n - 1) elsewhere, so that the mean over B is the mean over the others."""
        if not self.detach_first_step:
            return jnp.ones(self.batch.noise.shape[0], jnp.float32)
        n = len(self.times) - 1
        return (self.step_B > 0) * jnp.float32(n / (n - 1))

    @cached_property
    def first_step_weight_B(self):
        """Weight of each sample in a term about the first step alone, where the drawn one is it."""
        return (self.step_B == 0) * jnp.float32(len(self.times) - 1)

    def with_stream(self, name: str) -> "Context":
        """The same context with random numbers of its own, so that terms do not share draws."""
        return replace(self, stream=f"{self.stream}/{name}")

    def of(self, name: str) -> "Context":
        """The same context with the random numbers of the sum's term of that name."""
        return replace(self, stream=f"/{name}")

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
    """An objective. A weighted sum of terms is again a term.

    Besides what is below a term may have `check(times)`, which raises InputError where its options
    do not go with a student whose steps start from these times.
    """

    @property
    def needs(self) -> Needs: ...

    def __call__(self, context: Context) -> tuple[jax.Array, Metrics]:
        """Per-sample loss [B] in float32, and scalars to look at."""

    def critic_loss(self, context: Context) -> jax.Array:
        """Per-sample loss [B] of the critic; of the one term that trains it."""

    def discriminator_loss(self, context: Context) -> jax.Array:
        """Per-sample loss [B] of the discriminator; of the one term that trains it."""


def sample_mean(x):
    """Mean over all but the first axis: [B]."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
