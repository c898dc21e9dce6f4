"""Sums of weighted terms, and the one dict of names that a config may use."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import reduce
from operator import or_

import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, Term


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

    def __call__(self, context: Context):
        total_B, metrics = 0.0, {}
        for weight, term in self.parts:
            name = type(term).__name__.lower()  # also the name of its random stream
            loss_B, extra = term(context.named(name))
            metrics |= {f"loss/{name}": jnp.mean(loss_B)}
            metrics |= {f"{name}/{key}": value for key, value in extra.items()}
            total_B = total_B + (loss_B if weight == 1 else weight * loss_B)
        return total_B, metrics

    def critic_loss(self, context: Context):
        (term,) = (term for _, term in self.parts if term.needs.critic and has_critic_loss(term))
        return term.critic_loss(context.named("critic"))


def has_critic_loss(term) -> bool:
    return hasattr(term, "critic_loss")


def build(config: Mapping[str, Mapping], terms: Mapping[str, type], steps: int) -> Sum:
    """name -> {weight, ...} as a Sum.

    Raises: InputError for an unknown name or option, a bad weight, an empty sum, a critic that
    nobody or more than one term trains, and an anchor on a student of one step.
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
        parts.append((float(weight), terms[name](**options)))
    total = Sum(tuple(parts))
    if not total.parts:
        raise InputError("objective: found no term of non-zero weight; expected at least one")
    trainers = [t for _, t in total.parts if has_critic_loss(t)]
    if total.needs.critic and len(trainers) != 1:
        raise InputError(
            f"objective: found {len(trainers)} terms that train the critic; expected one"
        )
    if total.needs.cut_first and steps < 2:
        raise InputError(
            f"student.steps: found {steps}; expected at least 2, because the anchor takes the "
            "first step and the base objective needs another"
        )
    return total
