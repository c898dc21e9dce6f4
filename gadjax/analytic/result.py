"""How near a map from noise to x0 is to the teacher's own, and what it draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gadjax.analytic.teachers import Gaussian, Mixture
from gadjax.types import Params

PROJECTIONS = 128


class Reference(NamedTuple):
    """Held-out noises [N, D], N samples of the teacher from other noises, and for the first M
    noises where the teacher's exact ODE takes them [M, D] and its Jacobians [M, D, D]."""

    noise: np.ndarray
    sample: np.ndarray
    end: np.ndarray
    jacobian: np.ndarray


@dataclass(frozen=True)
class Result:
    """A student G beside its teacher, Phi being the teacher's exact ODE map.

    modes_covered: share of the components that hold at least half of what is due to them. One
      holds the samples nearest to it, but none further off than nearly all of its own (98 %).
    mode_spread: root mean square distance from the nearest component's mean in its own standard
      deviations and by dimension: 1 for the teacher, above where modes are blurred or missed.
    sliced_wasserstein: W2 between what both draw, root mean square over random projections.
    transport_cost: E |G(z) - Phi(z)|^2 over the trace of the teacher's covariance: 0 for the
      teacher's own map, 2 where the right distribution is drawn from unrelated noise.
    jacobian_error: sqrt(E |J_G - J_Phi|_F^2 / E |J_Phi|_F^2).
    jacobian_cosine: E <J_G, J_Phi> / (|J_G| |J_Phi|).
    noise, samples: the held-out noises [N, D] and G of them. params: the student's, if it has any.
    """

    modes_covered: float
    mode_spread: float
    sliced_wasserstein: float
    transport_cost: float
    jacobian_error: float
    jacobian_cosine: float
    noise: np.ndarray
    samples: np.ndarray
    params: Params | None = None


def compare_maps(
    teacher: Gaussian | Mixture,
    reference: Reference,
    samples_ND: np.ndarray,
    jacobian_MDD: np.ndarray,
    params: Params | None = None,
) -> Result:
    """What a map makes of the reference's noises, and its Jacobians at the first M."""
    samples, found = np.asarray(samples_ND, float), np.asarray(jacobian_MDD, float)
    end, wanted = reference.end, reference.jacobian
    which_N, square_N, dim = teacher.nearest(samples)
    near = which_N[square_N < dim + 3 * np.sqrt(2 * dim)]
    held = np.bincount(near, minlength=len(teacher.weights)) / len(samples)
    axes = (1, 2)
    sizes = np.sqrt(np.sum(found**2, axes) * np.sum(wanted**2, axes))
    cosine = np.sum(found * wanted, axes) / np.maximum(sizes, np.finfo(float).tiny)
    return Result(
        modes_covered=float(np.mean(held >= 0.5 * teacher.weights)),
        mode_spread=float(np.sqrt(np.mean(square_N) / dim)),
        sliced_wasserstein=sliced_wasserstein(samples, reference.sample),
        transport_cost=float(
            np.mean(np.sum((samples[: len(end)] - end) ** 2, axis=1)) / teacher.total_variance
        ),
        jacobian_error=float(np.sqrt(np.sum((found - wanted) ** 2) / np.sum(wanted**2))),
        jacobian_cosine=float(np.mean(cosine)),
        noise=reference.noise,
        samples=samples,
        params=params,
    )


def sliced_wasserstein(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Root mean square over random directions of W2 between the projections (Rabin et al. 2011)."""
    v = np.random.default_rng(0).normal(size=(a_ND.shape[1], PROJECTIONS))
    v /= np.linalg.norm(v, axis=0)
    a, b = (np.sort(x @ v, axis=0) for x in (a_ND, b_ND))
    return float(np.sqrt(np.mean((a - b) ** 2)))


COLUMNS = {
    "modes": "modes_covered",
    "mode spread": "mode_spread",
    "sliced W2": "sliced_wasserstein",
    "transport cost": "transport_cost",
    "Jacobian error": "jacobian_error",
    "Jacobian cosine": "jacobian_cosine",
}


def table(rows: Mapping[str, Sequence[Result]]) -> str:
    """Markdown: per row the mean over its results and, where there are several, their range."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label, results in rows.items():
        cells = []
        for name in COLUMNS.values():
            values = [getattr(result, name) for result in results]
            several = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{several}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
