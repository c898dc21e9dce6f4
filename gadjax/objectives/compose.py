"""Sums of weighted terms, and the one dict of names that a config may use."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from operator import or_

import jax
import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, Term
from gadjax.types import Metrics, Params


class Addable:
    """`dmd + 0.5 * gad + 0.05 * anchor` for every term."""

    def __add__(self, other):
        return Sum(((1.0, self),)) + other

    def __rmul__(self, weight: float):
        return Sum(((float(weight), self),))


@dataclass(frozen=True)
class Sum:
    """A weighted sum of terms. A term of weight zero is dropped here, before anything is traced:
    what remains is bit for bit what it would be without it."""

    parts: tuple[tuple[float, Term], ...]

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple(p for p in self.parts if p[0] != 0))

    def __add__(self, other):
        return Sum(self.parts + (other.parts if isinstance(other, Sum) else ((1.0, other),)))

    def __rmul__(self, weight: float):
        return Sum(tuple((float(weight) * w, term) for w, term in self.parts))

    @property
    def needs(self) -> Needs:
        return reduce(or_, (term.needs for _, term in self.parts), Needs())

    def each(self, context: Context) -> Iterator[tuple[str, float, jax.Array, Metrics]]:
        """Name, weight, per-sample loss [B] and scalars of every term."""
        for weight, term in self.parts:
            name = type(term).__name__.lower()  # also the name of its random stream
            yield name, weight, *term(context.named(name))

    def __call__(self, context: Context):
        total_B, metrics = 0.0, {}
        for name, weight, loss_B, extra in self.each(context):
            metrics |= {f"loss/{name}": jnp.mean(loss_B)}
            metrics |= {f"{name}/{key}": value for key, value in extra.items()}
            total_B = total_B + (loss_B if weight == 1 else weight * loss_B)
        return total_B, metrics

    def check(self, steps: int) -> None:
        """Raises: InputError for an empty sum, a critic or discriminator that nobody or more than
        one term trains, and options that do not go with a student of `steps` steps."""
        if not self.parts:
            raise InputError("objective: found no term of non-zero weight; expected at least one")
        for role in ("critic", "discriminator"):
            trainers = self._trainers(role)
            if getattr(self.needs, role) and len(trainers) != 1:
                raise InputError(
                    f"objective: found {len(trainers)} terms that train the {role}; expected one"
                )
        if self.needs.cut_first and steps < 2:
            raise InputError(
                f"student.steps: found {steps}; expected at least 2, because the anchor takes the "
                "first step and the base objective needs another"
            )
        tangent = self.needs.tangent
        if tangent and tangent.kind == "control" and not any(self.needs.maps.values()):
            raise InputError("direction: found 'control' and no teacher map; expected gad as well")
        for _, term in self.parts:
            if hasattr(term, "check"):
                term.check(steps)

    def needs_of(self, roles: Iterable[str]) -> Needs:
        """What the terms that train these networks need, under the cut of the whole sum."""
        found = (term.needs for role in roles for term in self._trainers(role))
        return reduce(or_, found, Needs(cut_first=self.needs.cut_first))

    def _trainers(self, role: str) -> list[Term]:
        return [term for _, term in self.parts if hasattr(term, f"{role}_loss")]

    def init_discriminator(self, key, width: int) -> Params:
        """Its parameters, for features of `width`."""
        (term,) = self._trainers("discriminator")
        return term.init_discriminator(key, width)

    def critic_loss(self, context: Context):
        (term,) = self._trainers("critic")
        return term.critic_loss(context.named("critic"))

    def discriminator_loss(self, context: Context):
        (term,) = self._trainers("discriminator")
        return term.discriminator_loss(context.named("discriminator"))


def build(config: Mapping[str, Mapping], terms: Mapping[str, type], steps: int) -> Sum:
    """name -> {weight, ...} as a Sum for a student of `steps` steps.

    Raises: InputError for an unknown name or option, a bad weight, and what Sum.check refuses.
    """
    parts = []
    for name, options in config.items():
        if name not in terms:
            raise InputError(f"objective: found {name!r}; expected one of {', '.join(terms)}")
        if not hasattr(options, "items"):
            raise InputError(f"objective.{name}: found {options!r}; expected options by name")
        options = dict(options)
        weight = options.pop("weight", 1.0)
        if not isinstance(weight, int | float):
            raise InputError(f"objective.{name}.weight: found {weight!r}; expected a number")
        known = {f.name for f in fields(terms[name])}
        for option in options:
            if option not in known:
                raise InputError(
                    f"objective.{name}: found {option!r}; expected weight"
                    + "".join(f", {k}" for k in sorted(known))
                )
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        parts.append((float(weight), terms[name](**options)))
    total = Sum(tuple(parts))
    total.check(steps)
    return total


def as_config(objective: Term | Mapping, terms: Mapping[str, type]) -> Mapping[str, Mapping]:
    """The mapping of which `build` makes this term or sum again; a mapping as it is.

    Raises: InputError for a term that `terms` has no name for, or that is there twice.
    """
    if isinstance(objective, Mapping):
        return objective
    names, config = {kind: name for name, kind in terms.items()}, {}
    for weight, term in (Sum(()) + objective).parts:
        kind = type(term)
        if kind not in names:
            raise InputError(
                f"objective: found {kind.__name__}, which no config can name; expected one of "
                f"{', '.join(terms)} (or gadjax.objectives.TERMS['mine'] = {kind.__name__})"
            )
        if names[kind] in config:
            raise InputError(f"objective: found {names[kind]} twice; expected each term once")
        chosen = ((f.name, getattr(term, f.name), f.default) for f in fields(term))
        options = {name: value for name, value, default in chosen if value != default}
        config[names[kind]] = options if weight == 1 else {"weight": weight, **options}
    return config
