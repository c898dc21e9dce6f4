"""Random cases held against torch: equal, or refused by name, never different.

GADJAX_SWEEP: cases of each component (text encoders, U-Nets, pipelines, ...), of which each of its
classes has an equal share; 40 unless it is set, and 500 in the full sweep.
GADJAX_SWEEP_SEED: the seed of the first case, 0 unless it is set. A failure prints its seed, so
that GADJAX_SWEEP=1 GADJAX_SWEEP_SEED=<seed> and pytest's -k <class> repeat it alone.
"""

import gc
import math
import os
import re
import shutil
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gadjax.errors import InputError

CASES = int(os.environ.get("GADJAX_SWEEP", 40))
FIRST_SEED = int(os.environ.get("GADJAX_SWEEP_SEED", 0))
TOLERANCE = 1e-5  # of the largest value, in float32
WIDE = 1e-6  # of both in float64, but for what torch computes in float32 there too
ROUNDINGS = 4  # of torch's own rounding errors, where these are larger
UNSTABLE = 0.03  # torch's rounding above which nothing is shown
TRIES = 20  # draws for each case that torch takes
CACHED = 20  # cases between two clearings of JAX's programs

Outputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One random configuration.

    config: whatever repeats the case by hand. names: what a refusal may name. expected: torch's
    outputs; raises where torch cannot take the configuration, which is then no case. actual:
    gadjax's. exact: torch's outputs in float64, by which its own rounding error is known. wide:
    gadjax's in float64, which tells rounding from another function.
    """

    config: Any
    names: frozenset[str]
    expected: Callable[[], Outputs]
    actual: Callable[[], Outputs]
    exact: Callable[[], Outputs] | None = None
    wide: Callable[[], Outputs] | None = None
    tolerance: float = TOLERANCE


def sweep(
    component: str,
    draw: Callable[[np.random.Generator, Path], Case],
    folder: Path,
    classes: int = 1,
) -> None:
    """Draw cases until torch has taken enough of them; fail for any that differs.

    draw: (generator, empty folder) -> Case; raises where torch cannot make the configuration.
    classes: that share the CASES of a component.
    """
    cases = math.ceil(CASES / classes)
    equal, refused, failed, untaken = 0, Counter(), [], Counter()
    began, largest = time.time(), 0.0
    for seed in range(FIRST_SEED, FIRST_SEED + TRIES * cases):
        if equal + refused.total() + len(failed) == cases:
            break
        place = folder / str(seed)
        place.mkdir()
        rng = np.random.default_rng([zlib.crc32(component.encode()), seed])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case = draw(rng, place)
                expected = case.expected()
            assert all(np.isfinite(value).all() for value in expected.values()), "not finite"
        except Exception as error:
            untaken[f"{type(error).__name__}: {error}"[:90]] += 1
            shutil.rmtree(place)
            continue
        try:
            error = compare(case, expected)
            equal, largest = equal + 1, max(largest, error)
        except InputError as error:
            if (name := named(str(error), case.names)) is None:
                failed.append(failure(component, seed, case, f"refused without a name: {error}"))
            else:
                refused[name] += 1
        except Exception:
            failed.append(failure(component, seed, case, traceback.format_exc()))
        shutil.rmtree(place)
        if (equal + refused.total() + len(failed)) % CACHED == 0:
            jax.clear_caches()
            gc.collect()
    count = equal + refused.total() + len(failed)
    reasons = ", ".join(f"{name} {n}" for name, n in refused.most_common())
    print(
        f"{component}: cases {count}, equal {equal} (largest difference {largest:.1e}), "
        f"refused {refused.total()} (by key: {reasons}), different {len(failed)}, "
        f"{(time.time() - began) / max(count, 1):.2f} s a case; torch refused {untaken.total()}"
    )
    if untaken.total() > count:
        print("\n".join(f"  torch: {n} x {reason}" for reason, n in untaken.most_common(8)))
    assert not failed, "\n\n".join(failed)
    assert count == cases, f"torch took {count} of {TRIES * cases} configurations: {untaken}"
    # Of fewer, as where one is repeated, all may be refused.
    assert count < 5 or 2 * equal >= count, (
        f"{component}: found {equal} equal of {count}; expected half"
    )


def compare(case: Case, expected: Outputs) -> float:
    """The largest difference of any output, as a share of the output's largest value."""
    actual = case.actual()
    assert actual.keys() == expected.keys(), (list(actual), list(expected))
    errors = {name: relative(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.get)
    if errors[worst] > case.tolerance and case.exact is not None:
        exact = case.exact()
        for name, error in errors.items():
            rounding = relative(expected[name], exact[name])
            assert rounding <= UNSTABLE, (
                f"{name}: torch's own rounding {rounding:.1e} shows nothing"
            )
            allowed = max(case.tolerance, ROUNDINGS * rounding)
            if error > allowed and case.wide is not None:  # rounding it is, if float64 has none
                assert relative(case.wide()[name], exact[name]) <= WIDE, f"{name}: in float64"
                allowed = max(allowed, 3 * case.tolerance)
            assert error <= allowed, f"{name}: {error:.1e} (torch's own rounding {rounding:.1e})"
    else:
        assert errors[worst] <= case.tolerance, f"{worst}: {errors[worst]:.1e}"
    return errors[worst]


def relative(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape}"
    assert np.isfinite(actual).all(), "found values that are not finite"
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


def named(message: str, names: frozenset[str]) -> str | None:
    """The key or file that a refusal names before what it found; the first of any otherwise."""
    words = [word for word in re.findall(r"[\w.]+", message) if word in names]
    before = re.findall(r"([\w.]+): found", message)
    return next((word for word in before[::-1] if word in names), words[0] if words else None)


def failure(component: str, seed: int, case: Case, reason: str) -> str:
    return f"{component}, GADJAX_SWEEP_SEED={seed}: {case.config}\n{reason}"


class Choice:
    """Random choices of a generator, plain Python values."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def __call__(self, *values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def number(self, low: float, high: float) -> float:
        """With few digits, as people write them."""
        return round(float(self.rng.uniform(low, high)), 3)

    def some(self, values: list, probability: float = 0.5) -> list:
        return [value for value in values if self.chance(probability)]
