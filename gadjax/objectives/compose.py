"""Weighted sums of objective terms, and the registry of their config names."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from operator import or_

import jax
import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.schedules import NoiseSchedule
from gadjax.errors import InputError, short_repr
from gadjax.objectives.base import Context, Needs, Term
from gadjax.types import Metrics, Params, PyTree

# Config name -> class of the term, filled by gadjax.objectives.
TERMS: dict[str, type] = {}
# Random streams whose names differ from the config's: a rename would change their draws.
STREAMS = {"gad_lift": "gadlift", "gad_script": "gadscript"}

# Type of an option's default -> accepted types, and their name in messages.
OPTIONS = {
    bool: (bool, "True or False"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "a name"),
    tuple: (tuple, "a list"),
    type(None): (int | float | None, "a number"),
}


class Addable:
    """Operators of a term: `dmd + 0.5 * gad + 0.05 * anchor` is a Sum."""

    def __add__(self, other):
        return Sum(((1.0, self),)) + other

    def __rmul__(self, weight: float):
        return Sum(((float(weight), self),))


@dataclass(frozen=True)
class Sum:
    """Weighted sum of terms, itself a term.

    Terms of weight zero are dropped here, before anything is traced: the rest is bit for bit what
    it would be without them.

    Attributes:
      parts: (weight, term) pairs.
      names: of each term's metrics and random stream; by default its config name in TERMS (for an
        unregistered class the class name in lower case), and NAME_2, NAME_3 for more of one class.
    """

    parts: tuple[tuple[float, Term], ...]
    names: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self):
        parts = tuple(p for p in self.parts if p[0] != 0)
        names = default_names(type(term) for _, term in parts)
        if self.names:
            given = zip(self.parts, self.names, strict=True)
            names = tuple(name for (weight, _), name in given if weight != 0)
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "names", names)

    def __add__(self, other):
        return Sum(self.parts + (other.parts if isinstance(other, Sum) else ((1.0, other),)))

    def __rmul__(self, weight: float):
        return Sum(tuple((float(weight) * w, term) for w, term in self.parts))

    @property
    def needs(self) -> Needs:
        return reduce(or_, (term.needs for _, term in self.parts), Needs())

    def term_losses(self, context: Context) -> Iterator[tuple[str, float, jax.Array, Metrics]]:
        """Name, weight, loss per sample [B] and scalar metrics of every term."""
        for (weight, term), name in zip(self.parts, self.names, strict=True):
            of_term = context.with_stream(STREAMS.get(name, name))
            if context.memory:
                of_term = replace(of_term, memory=context.memory.get(name))
            loss_B, metrics = term(of_term)
            yield name, weight, _base_weighted(term, loss_B, context), metrics

    def __call__(self, context: Context):
        total_B, metrics = 0.0, {}
        for name, weight, loss_B, extra in self.term_losses(context):
            metrics |= {f"loss/{name}": jnp.mean(loss_B)}
            metrics |= {f"{name}/{key}": value for key, value in extra.items()}
            total_B = total_B + (loss_B if weight == 1 else weight * loss_B)
        return total_B, metrics

    def init_memory(self) -> dict[str, PyTree]:
        """Initial memories of the terms that have one, by name."""
        named = zip(self.names, self.parts, strict=True)
        made = {n: term.init_memory() for n, (_, term) in named if hasattr(term, "init_memory")}
        return {name: memory for name, memory in made.items() if memory is not None}

    def remember(self, memory: Mapping[str, PyTree], metrics: Metrics) -> dict[str, PyTree]:
        """Memories after an update, from its metrics of the whole batch."""
        terms = {name: term for name, (_, term) in zip(self.names, self.parts, strict=True)}
        return {
            name: terms[name].remember(
                old,
                {
                    k.removeprefix(f"{name}/"): v
                    for k, v in metrics.items()
                    if k.startswith(f"{name}/")
                },
            )
            for name, old in memory.items()
        }

    def check(self, times: Sequence[float], rollout: str = "ode") -> None:
        """Check that the terms fit each other and the student's steps.

        Args:
          times: of the student's steps in the network's units, falling, without the clean end.
          rollout: "ode" or "fresh_noise".

        Raises: InputError for an empty sum, for a critic or discriminator that no term or several
          terms train, and for options that do not fit the grid.
        """
        if not self.parts:
            raise InputError("objective: found no term of non-zero weight; expected at least one")
        for role in ("critic", "discriminator"):
            trainers = self._trainers(role)
            if getattr(self.needs, role) and len(trainers) != 1:
                raise InputError(
                    f"objective: found {len(trainers)} terms that train the {role}; expected one"
                )
        if self.needs.detach_first_step and len(times) < 2:
            raise InputError(
                f"student.steps: found {len(times)}; expected at least 2, because the anchor takes "
                "the first step and the base objective needs another"
            )
        tangent = self.needs.tangent
        if tangent and tangent.kind == "control" and not self.needs.map_tangents:
            raise InputError("direction: found 'control' and no teacher map; expected gad as well")
        for name, (_, term) in zip(self.names, self.parts, strict=True):
            if term.needs.next_latent and rollout != "ode":
                raise InputError(
                    f"objective.{name}: found a loss of the student's next latent, and "
                    f"student.rollout {rollout!r}; expected 'ode', another term, or end='clean' or "
                    "'whole'"
                )
            if hasattr(term, "check"):
                term.check(times)

    def check_denoiser(self, denoiser: Denoiser) -> None:
        """Check that the terms fit the teacher's schedule and guidance. Raises: InputError."""
        for _, term in self.parts:
            if hasattr(term, "check_denoiser"):
                term.check_denoiser(denoiser)

    def check_grid(self, schedule: NoiseSchedule, times: Sequence[float]) -> None:
        """Check that the terms fit the noise levels at which the student's steps start.

        Args:
          schedule: the teacher's.
          times: of the steps, falling, without the clean end.

        Raises: InputError.
        """
        for _, term in self.parts:
            if hasattr(term, "check_grid"):
                term.check_grid(schedule, times)

    def trainer_needs(self, roles: Iterable[str]) -> Needs:
        """Needs of the terms that train these networks, with the `detach_first_step` of the sum."""
        needs = (term.needs for role in roles for term in self._trainers(role))
        return reduce(or_, needs, Needs(detach_first_step=self.needs.detach_first_step))

    def _trainers(self, role: str) -> list[Term]:
        return [term for _, term in self.parts if hasattr(term, f"{role}_loss")]

    def init_discriminator(self, key, width: int) -> Params:
        """Initial parameters of the discriminator, for features of `width`, or for pictures of so
        many channels."""
        (term,) = self._trainers("discriminator")
        return term.init_discriminator(key, width)

    def critic_loss(self, context: Context):
        (term,) = self._trainers("critic")
        return _base_weighted(term, term.critic_loss(context.with_stream("critic")), context)

    def discriminator_loss(self, context: Context):
        (term,) = self._trainers("discriminator")
        loss_B = term.discriminator_loss(context.with_stream("discriminator"))
        return _base_weighted(term, loss_B, context)


def _base_weighted(term: Term, loss_B, context: Context):
    """A term's loss per sample [B], without the first step where that belongs to another term."""
    drawn_step = term.needs.student and not getattr(term, "at_first_step", False)
    return loss_B * context.base_weight_B if drawn_step else loss_B


def default_names(kinds: Iterable[type]) -> tuple[str, ...]:
    """Names in a sum of terms of these classes."""
    known, counts, names = {kind: name for name, kind in TERMS.items()}, Counter(), []
    for kind in kinds:
        name = known.get(kind, kind.__name__.lower())
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return tuple(names)


def term_class(name: str, terms: Mapping[str, type]) -> type | None:
    """Class of the term NAME, or of one more, NAME_2; None for an unknown name."""
    more = re.fullmatch(r"(.+)_([2-9]|[1-9][0-9]+)", name)
    return terms.get(name) or (terms.get(more[1]) if more else None)


def build(
    config: Mapping[str, Mapping],
    terms: Mapping[str, type],
    times: Sequence[float],
    rollout: str = "ode",
) -> Sum:
    """Build the Sum of an objective's config.

    Args:
      config: name -> {weight, option, ...}; a second term of one class is NAME_2.
      terms: config name -> class.
      times: of the student's steps, falling, without the clean end.
      rollout: of the student's steps, "ode" or "fresh_noise".

    Raises: InputError for an unknown name or option, a bad weight, and as `Sum.check`.
    """
    parts = []
    for name, options in config.items():
        kind = term_class(name, terms)
        if kind is None:
            raise InputError(f"objective: found {name!r}; expected one of {', '.join(terms)}")
        if not hasattr(options, "items"):
            raise InputError(f"objective.{name}: found {options!r}; expected options by name")
        options = dict(options)
        weight = options.pop("weight", 1.0)
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise InputError(f"objective.{name}.weight: found {weight!r}; expected a number")
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        known = {f.name: f.default for f in fields(kind)}
        for option, value in options.items():
            if option not in known:
                raise InputError(
                    f"objective.{name}: found {option!r}; expected weight"
                    + "".join(f", {k}" for k in sorted(known))
                )
            expected, type_name = OPTIONS.get(type(known[option]), (object, ""))
            if not isinstance(value, expected) or isinstance(value, bool) and expected is not bool:
                raise InputError(
                    f"objective.{name}.{option}: found {value!r}; expected {type_name}"
                )
        parts.append((float(weight), kind(**options)))
        check_values(name, parts[-1][1])
    total = Sum(tuple(parts), names=tuple(config))
    total.check(times, rollout)
    return total


def check_values(name: str, term: Term) -> None:
    """Check a term's numbers and names, beside what its class does.

    Raises: InputError for a number that is not finite, and for sources that are no names.
    """
    for option in (option.name for option in fields(term)):
        value = getattr(term, option)
        entries = value if isinstance(value, tuple) else (value,)
        if any(isinstance(entry, float) and not math.isfinite(entry) for entry in entries):
            raise InputError(
                f"objective.{name}.{option}: found {short_repr(value)}; expected finite numbers"
            )
        if option in getattr(term, "sources", ()) and not all(isinstance(e, str) for e in entries):
            raise InputError(
                f"objective.{name}.{option}: found {short_repr(value)}; expected names of networks"
            )


def as_config(objective: Term | Mapping, terms: Mapping[str, type]) -> Mapping[str, Mapping]:
    """Config from which `build` makes this term or sum again; a mapping is returned as it is.

    Raises: InputError for a term that has no name in `terms`.
    """
    if isinstance(objective, Mapping):
        return objective
    total = objective if isinstance(objective, Sum) else Sum(((1.0, objective),))
    config = {}
    for (weight, term), name in zip(total.parts, total.names, strict=True):
        kind = type(term)
        if term_class(name, terms) is not kind:
            raise InputError(
                f"objective: found {kind.__name__}, which no config can name; expected one of "
                f"{', '.join(terms)} (or gadjax.objectives.TERMS['mine'] = {kind.__name__})"
            )
        values = ((f.name, getattr(term, f.name), f.default) for f in fields(term))
        options = {name: value for name, value, default in values if value != default}
        config[name] = options if weight == 1 else {"weight": weight, **options}
    return config
