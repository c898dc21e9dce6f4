"""Interface of objective terms: their needs, and the context that an update gives them."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.geometry import Blocks, Directions
from gadjax.errors import InputError
from gadjax.types import Batch, Cond, Metrics, Prediction


@dataclass(frozen=True)
class TeacherMap:
    """Map of the teacher's guided ODE, in DDIM/Euler steps.

    Attributes:
      end: "next" (the following time of the student's grid) or "clean", both from the latent and
        time of the drawn step; or "whole", from the initial noise z to the clean end.
      steps: number of steps; 0: 4, or 8 over the whole of the student's span, to the clean end or
        in a student of one step: from the noise in 4 steps a teacher is no teacher.
      until: with "next", the time at which the map ends if the drawn step is the first.
    """

    end: str = "next"
    steps: int = 0
    until: float | None = None

    def __post_init__(self):
        if self.end not in ("next", "clean", "whole"):
            raise InputError(
                f"objective: found end {self.end!r}; expected 'next', 'clean' or 'whole'"
            )
        if self.steps < 0:
            raise InputError(
                f"objective: found a map of {self.steps} steps; expected 1 or more, or 0 for the "
                "default"
            )

    def count(self, student_steps: int) -> int:
        """Number of steps beside a student of so many."""
        from_noise = self.end != "next" or student_steps == 1
        return self.steps or (8 if from_noise else 4)


@dataclass(frozen=True)
class Needs:
    """Inputs that a term requests from the update; a need of several terms is computed once.

    Attributes:
      student: the student's prediction at its drawn step, with gradient.
      next_latent: the term takes the student's next latent on the ODE, which a student that adds
        fresh noise does not have.
      first_step: teacher maps from z at the first time, each with the student's prediction there,
        with gradient. For all samples if the student's full rollout is computed anyway (`endpoint`
        or `full_map`) and no other term needs the map; otherwise for samples whose drawn step is
        the first, which share that step and its maps with other terms.
      full_map: the student's full few-step map from z, with gradient through every step.
      tangent: directions of the tangents of `student`, `full_map` and `map_tangents`.
      maps, map_tangents: teacher maps whose ends, and whose tangents, the term takes.
      teacher, jvp: the term evaluates the teacher, or takes a network's derivatives, itself.
      endpoint: end of the student's rollout from z, detached after the first step if
        `detach_first_step`.
      critic, discriminator: the term evaluates that network, which must then be trained.
      detach_first_step: the first step is another term's: a base objective's gradient stops there.
      images, pixels: clean latents from the data; the autoencoder's decoder, `Context.pixels`.
      override: option of `data` that makes `Batch.override`: "forget" or "styles".
      ema: the term evaluates the average of the student's parameters.
      fewer_layers: the student has fewer layers than the teacher (`student.layers`).
      networks: name -> source of a frozen network that the term evaluates (`Context.net`):
        "teacher"; "start", the student's initial parameters; a diffusers folder; or a workdir.
      joint: a sample's loss depends on the others of the batch, which has to be one microbatch.
      few_step: the term trains a student of few steps although it may have no need of the teacher.
    """

    student: bool = False
    next_latent: bool = False
    first_step: tuple[TeacherMap, ...] = ()
    full_map: bool = False
    tangent: Directions | None = None
    maps: tuple[TeacherMap, ...] = ()
    map_tangents: tuple[TeacherMap, ...] = ()
    teacher: bool = False
    jvp: bool = False
    endpoint: bool = False
    critic: bool = False
    discriminator: bool = False
    detach_first_step: bool = False
    images: bool = False
    pixels: bool = False
    override: str | None = None
    ema: bool = False
    fewer_layers: bool = False
    networks: Mapping[str, str] = field(default_factory=dict)
    joint: bool = False
    few_step: bool = False

    @property
    def all_maps(self) -> tuple[TeacherMap, ...]:
        return tuple(dict.fromkeys(self.maps + self.map_tangents))

    @property
    def is_few_step(self) -> bool:
        """True if the result is a student, sampled on its own grid without guidance; what plain
        denoising trains is sampled as a teacher is."""
        return self.uses_teacher or self.few_step

    @property
    def uses_teacher(self) -> bool:
        """True if the objective evaluates the teacher; training on pictures alone does not."""
        on_features = self.discriminator and not self.pixels  # of teacher or critic
        return bool(self.all_maps or self.first_step) or self.teacher or self.critic or on_features

    def __or__(self, other: "Needs") -> "Needs":
        return _union(self, other)


def _union(a: Needs, b: Needs) -> Needs:
    """Needs of two terms together. Raises: InputError for two kinds of directions or sources."""
    if a.tangent and b.tangent and a.tangent != b.tangent:
        raise InputError(
            f"objective: found directions {_describe(a.tangent)} and "
            f"{_describe(b.tangent)}; expected one choice for all terms"
        )
    for name in set(a.networks) & set(b.networks):
        if a.networks[name] != b.networks[name]:
            raise InputError(
                f"objective: found the network {name!r} from {a.networks[name]} and from "
                f"{b.networks[name]}; expected one source for all terms"
            )
    if a.override and b.override and a.override != b.override:
        raise InputError(
            "objective: found terms for data.forget and for data.styles; expected one of them"
        )
    either = {f.name: getattr(a, f.name) or getattr(b, f.name) for f in fields(a) if f.type is bool}
    maps = {
        name: tuple(dict.fromkeys(getattr(a, name) + getattr(b, name)))
        for name in ("first_step", "maps", "map_tangents")
    }
    return Needs(
        tangent=a.tangent or b.tangent,
        networks={**a.networks, **b.networks},
        override=a.override or b.override,
        **maps,
        **either,
    )


def _describe(directions: Directions) -> str:
    of_samples = f" of one in {directions.one_in} samples" if directions.one_in > 1 else ""
    return f"{directions.count} x {directions.kind!r}{of_samples}"


class FirstStep(NamedTuple):
    """First step of the student, and of a teacher map from the same z.

    Attributes:
      prediction: the student's prediction at z, with gradient.
      teacher_end: end of the teacher map [B, H, W, C].
      weight_B: weight of each sample, by which the mean over B is the mean over the samples that
        have a first step. The other samples' values are finite and meaningless.
    """

    prediction: Prediction
    teacher_end: jax.Array
    weight_B: jax.Array


class Draws:
    """Random numbers of a context: functions of each sample's key and of names alone."""

    batch: Batch
    stream: str

    def with_stream(self, name: str) -> Self:
        """This context with a nested random stream, so that terms do not share draws."""
        return replace(self, stream=f"{self.stream}/{name}")

    def with_term_stream(self, name: str) -> Self:
        """This context with the random stream of the sum's term of that name."""
        return replace(self, stream=f"/{name}")

    def _keys(self, name: str):
        return stream_keys(self.batch.key, f"{self.stream}/{name}")

    def normal(self, name: str):
        """Standard normal [B, H, W, C], a function of each sample's key and the name alone."""
        shape = self.batch.noise.shape[1:]
        return jax.vmap(lambda k: jax.random.normal(k, shape))(self._keys(name))

    def uniform(self, name: str):
        """Uniform [B] in [0, 1), a function of each sample's key and the name alone."""
        return jax.vmap(jax.random.uniform)(self._keys(name))

    def batch_key(self, name: str):
        """Key that all samples of the batch share: its first sample's, for the name."""
        return self._keys(name)[0]


class StepTimes:
    """Times of a context's drawn steps, on its grid."""

    times: tuple[float, ...]
    grid_NB: jax.Array | None
    step_B: jax.Array | None

    @cached_property
    def t_B(self):
        """Times [B] at which the drawn steps start."""
        return self._times_at(self.step_B)

    @cached_property
    def next_B(self):
        """Times [B] at which the drawn steps end."""
        return self._times_at(self.step_B + 1)

    def _times_at(self, index_B):
        if self.grid_NB is None:
            return jnp.asarray(self.times, float)[index_B]  # float32 but for x64
        return self.grid_NB[index_B, jnp.arange(len(index_B))]


@dataclass(frozen=True)
class Context(Draws, StepTimes):
    """One batch as terms get it: networks, drawn steps, and the results of their `Needs`.

    Arrays with a trailing _B have one entry per sample. A (value, tangents) pair has tangents
    [J, N, ...] of the samples that `blocks` chooses. What was not requested is None, or empty.

    Attributes:
      denoiser: network, schedule and parameterization.
      batch: conditioning, initial noise and keys.
      times: the student's grid, with the clean end.
      grid_NB: times [n + 1, B] of a grid that is drawn anew for every sample; None: `times`.
      guidance: the run's guidance scale.
      teacher, critic: (x_BHWC, t_B, scale) -> Prediction; without a scale, `guidance` for the
        teacher and none for the critic. Gradients flow to x_BHWC.
      teacher_params, critic_params, student_params, ema_params, discriminator_params: parameters.
      networks: name -> parameters of the frozen networks that terms name.
      memory: the term's memory (`Term.init_memory`).
      pixels: latents [B, H, W, C] -> pictures, with gradient (`provide_pixels`).
      trained_steps: first of the steps that are drawn, and the one after the last.
      step_B: index of the drawn step on the student's grid.
      x_BHWC: the student's latent at the drawn step, without gradient.
      blocks: which samples have tangents; None: all, N = B.
      direction_JNHWC: directions of the tangents.
      student: prediction at the drawn step, and tangents.
      first_step: teacher map -> FirstStep.
      full_map: x0 of the student's full map from z, and tangents.
      maps: teacher map -> its end, and tangents.
      endpoint: x0 at the end of the student's rollout.
      detach_first_step: the first step belongs to another term.
      student_layers: the teacher's blocks that the student has; () for all.
      step, share: student updates done, as a number and as a share of the run; traced in a run.
      stream: prefix of the names of random numbers.
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
    ema_params: object = None
    networks: Mapping[str, object] = field(default_factory=dict)
    memory: object = None
    pixels: Callable[[jax.Array], jax.Array] | None = None
    grid_NB: jax.Array | None = None
    trained_steps: tuple[int, int] = (0, 0)
    step_B: jax.Array | None = None
    x_BHWC: jax.Array | None = None
    blocks: Blocks | None = None
    direction_JNHWC: jax.Array | None = None
    student: tuple[Prediction, Prediction | None] | None = None
    first_step: Mapping[TeacherMap, FirstStep] = field(default_factory=dict)
    full_map: tuple[jax.Array, jax.Array | None] | None = None
    maps: Mapping[TeacherMap, tuple[jax.Array, jax.Array | None]] = field(default_factory=dict)
    endpoint: jax.Array | None = None
    detach_first_step: bool = False
    student_layers: tuple[int, ...] = ()
    step: jax.Array | int = 0
    share: jax.Array | float = 0.0
    stream: str = ""

    def net(self, role: str, x_BHWC, t_B, scale=None, cond: Cond | None = None) -> Prediction:
        """Prediction of a network, under classifier-free guidance; gradients flow to x_BHWC.

        Args:
          role: "student", "ema", "teacher", "critic", or a name of `Needs.networks`.
          x_BHWC, t_B: noisy latents and their timesteps.
          scale: guidance scale; None for none, as `Denoiser.guided_raw` takes it.
          cond: conditioning; None: the batch's prompts.
        """
        params = self.networks.get(role)
        params = getattr(self, f"{role}_params") if params is None else params
        cond = self.batch.cond if cond is None else cond
        return self.denoiser.guided(params, x_BHWC, t_B, cond, self.batch.null, scale)

    def at_first_step(self) -> "Context":
        """This context with every sample at the first step, whose latent is z."""
        return replace(self, step_B=jnp.zeros_like(self.step_B), x_BHWC=self.batch.noise)

    @property
    def schedule(self):
        return self.denoiser.schedule

    @cached_property
    def base_weight_B(self):
        """Sample weights [B] of a base objective.

        1; if the first step belongs to another term, 0 at the first of n drawn steps and
        n / (n - 1) elsewhere, so that the mean over B is the mean over the later steps.
        """
        if not self.detach_first_step:
            return jnp.ones(self.batch.noise.shape[0], jnp.float32)
        n = self.trained_steps[1] - self.trained_steps[0]
        return (self.step_B > 0) * jnp.float32(n / (n - 1))


def map_end(context: Context, spec: TeacherMap):
    """Times [B] at which a teacher map ends."""
    if spec.end != "next":
        return jnp.full_like(context.t_B, context.schedule.clean)
    if spec.until is None:
        return context.next_B
    return jnp.where(context.step_B == 0, spec.until, context.next_B)


def first_step_weights(context: Context):
    """Sample weights [B] of a first-step term: n at the first of n drawn steps, 0 elsewhere."""
    first, end = context.trained_steps
    return (context.step_B == 0) * jnp.float32(end - first)


def stream_keys(keys_B, name: str):
    """Independent keys [B], one per sample, for a named random stream."""
    number = zlib.crc32(name.encode())
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)


class Term(Protocol):
    """Protocol of an objective term; a weighted sum of terms is again a term.

    A term may also have `check(times)`, which raises InputError if its options do not fit a student
    whose steps start at these times; `check_denoiser(denoiser)`, likewise for the teacher's
    schedule and guidance; `check_grid(schedule, times)`, for both together; and `at_first_step =
    True` if its loss of drawn steps (need `student`) counts at the first step even where that
    belongs to another term. Otherwise the sum drops those samples and weighs the others accordingly
    (`Context.base_weight_B`).

    A term with a memory has `init_memory()`, a PyTree of small arrays (or None, for no memory),
    which `Context.memory` gives it without gradient; and `remember(memory, metrics)`, the memory
    after a finite update of the student, from the term's own metrics of the whole batch, among them
    values per sample [B].

    `sources` names those of its options that are networks of `Needs.networks` (paths, or tuples of
    them).
    """

    @property
    def needs(self) -> Needs: ...

    def __call__(self, context: Context) -> tuple[jax.Array, Metrics]:
        """Loss per sample [B] in float32, and scalar metrics."""

    def critic_loss(self, context: Context) -> jax.Array:
        """The critic's loss per sample [B]; defined by the one term that trains it."""

    def discriminator_loss(self, context: Context) -> jax.Array:
        """The discriminator's loss per sample [B]; defined by the one term that trains it."""


def sample_mean(x):
    """Mean of each sample [B], over all axes but the first."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
