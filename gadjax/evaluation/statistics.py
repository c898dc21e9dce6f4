"""Estimates with 95 % confidence intervals: Wilson and bootstrap."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
Z = 1.959964  # 97.5 % quantile of the normal distribution


class Estimate(NamedTuple):
    """Value with the ends of its 95 % interval, None where no interval is known."""

    value: float
    low: float | None = None
    high: float | None = None


def wilson(hits: float, total: float) -> Estimate:
    """Rate with the score interval of Wilson (1927), which stays within [0, 1]."""
    rate, z2 = hits / total, Z * Z
    middle = (rate + z2 / (2 * total)) / (1 + z2 / total)
    reach = Z / (1 + z2 / total) * math.sqrt(rate * (1 - rate) / total + z2 / (4 * total**2))
    return Estimate(rate, max(0.0, middle - reach), min(1.0, middle + reach))


def clustered_wilson(hits_PS: np.ndarray) -> Estimate:
    """Rate of hits with Wilson's interval for the effective number of independent pictures.

    The S pictures of a prompt are a cluster: their number is divided by the design effect (Kish
    1965), the variance of the prompts' means over that of as many independent pictures, where it is
    above 1.
    """
    count, seeds = hits_PS.shape
    rate, total = float(hits_PS.mean()), hits_PS.size
    independent = rate * (1 - rate) / seeds
    effect = hits_PS.mean(1).var(ddof=1) / independent if independent and count > 1 else 1.0
    effective = total / max(effect, 1.0)
    return wilson(rate * effective, effective)._replace(value=rate)


def bootstrap(
    statistic: Callable[..., np.ndarray], *values_P: np.ndarray, seed: int = 0
) -> Estimate:
    """Statistic of P units' values with its percentile interval (Efron and Tibshirani 1993).

    Units (prompts, noises, paths) are drawn with replacement, the same ones for every array, so
    that a ratio's interval accounts for the dependence of its two sides.

    Args:
      statistic: arrays [..., P] -> [...].
      *values_P: its arguments.
      seed: of the resampling.
    """
    count = len(values_P[0])
    value = float(statistic(*values_P))
    if count < 2:
        return Estimate(value)
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    low, high = np.nanpercentile(statistic(*(values[drawn] for values in values_P)), (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def mean(values_P: np.ndarray) -> Estimate:
    """Mean of P units with its bootstrap interval."""
    return bootstrap(lambda v: v.mean(-1), values_P)


def ratio(above_P: np.ndarray, below_P: np.ndarray) -> Estimate:
    """Ratio of means with its bootstrap interval; the mean of `below_P` is not zero."""

    def statistic(above, below):
        below = below.mean(-1)
        # A resample of zeros only gives no value.
        return above.mean(-1) / np.where(below == 0, np.nan, below)

    return bootstrap(statistic, above_P, below_P)


def geometric_mean(values_P: np.ndarray) -> Estimate:
    """Geometric mean of positive numbers: for ratios, since twice and half cancel."""
    logs = np.log(np.maximum(values_P, np.finfo(np.float64).tiny))
    return bootstrap(lambda v: np.exp(v.mean(-1)), logs)
