"""Metrics of a student's map from noise to x0 against the teacher's exact ODE map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gadjax.analytic.teachers import Gaussian, Mixture
from gadjax.types import Params

PROJECTIONS = 128


class Reference(NamedTuple):
    """Reference of a teacher: noises, samples and its exact ODE map.

    noise: held-out noises [N, D].
    sample: N samples of the teacher from other noises [N, D].
    end: end points of the exact ODE from the first M noises [M, D].
    jacobian: Jacobians of that map [M, D, D].
    """

    noise: np.ndarray
    sample: np.ndarray
    end: np.ndarray
    jacobian: np.ndarray


@dataclass(frozen=True)
class Result:
    """Metrics of a student G against Phi, the teacher's exact ODE map.

    modes_covered: share of the components that hold at least half of their expected samples. A
      component holds the samples nearest to it, if no further off than 98 % of its own.
    mode_spread: root mean square distance from the nearest component's mean in its own standard
      deviations and by dimension: 1 for the teacher, above where modes are blurred or missed.
    sliced_wasserstein: W2 between the samples of both, root mean square over random projections.
    transport_cost: E |G(z) - Phi(z)|^2 over the trace of the teacher's covariance: 0 for the
      teacher's own map, 2 for the right distribution from unrelated noise.
    jacobian_error: sqrt(E |J_G - J_Phi|_F^2 / E |J_Phi|_F^2).
    jacobian_cosine: E <J_G, J_Phi> / (|J_G| |J_Phi|).
    noise, samples: the held-out noises [N, D] and G of them.
    params, critic: parameters of the student and of the critic, where there are such.
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
    critic: Params | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Those of `COLUMNS`, by their names here."""
        return {name: getattr(self, name) for name in COLUMNS.values()}


def compare_maps(
    teacher: Gaussian | Mixture,
    reference: Reference,
    samples_ND: np.ndarray,
    jacobian_MDD: np.ndarray,
    params: Params | None = None,
) -> Result:
    """Metrics of a map from its samples and Jacobians at the reference's noises.

    Args:
      teacher: the closed-form teacher.
      reference: noises and the teacher's exact map.
      samples_ND: the map's samples of all noises.
      jacobian_MDD: its Jacobians at the first M noises.
      params: the student's parameters, kept in the result.
    """
    samples, jacobian = np.asarray(samples_ND, float), np.asarray(jacobian_MDD, float)
    end, exact = reference.end, reference.jacobian
    which_N, square_N, dim = teacher.nearest(samples)
    near = which_N[square_N < dim + 3 * np.sqrt(2 * dim)]
    held = np.bincount(near, minlength=len(teacher.weights)) / len(samples)
    axes = (1, 2)
    sizes = np.sqrt(np.sum(jacobian**2, axes) * np.sum(exact**2, axes))
    cosine = np.sum(jacobian * exact, axes) / np.maximum(sizes, np.finfo(float).tiny)
    return Result(
        modes_covered=float(np.mean(held >= 0.5 * teacher.weights)),
        mode_spread=float(np.sqrt(np.mean(square_N) / dim)),
        sliced_wasserstein=sliced_wasserstein(samples, reference.sample),
        transport_cost=float(
            np.mean(np.sum((samples[: len(end)] - end) ** 2, axis=1)) / teacher.total_variance
        ),
        jacobian_error=float(np.sqrt(np.sum((jacobian - exact) ** 2) / np.sum(exact**2))),
        jacobian_cosine=float(np.mean(cosine)),
        noise=reference.noise,
        samples=samples,
        params=params,
    )


def sliced_wasserstein(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Sliced Wasserstein distance: W2 of projections, root mean square over random directions
    (Rabin et al. 2011)."""
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
    """Table in Markdown: the mean over each row's results and, of several, their range."""
    return metrics_table({k: [r.metrics for r in results] for k, results in rows.items()})


def metrics_table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The same of `Result.metrics`; a row without any has none of the cells."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label, runs in rows.items():
        cells = []
        for name in COLUMNS.values():
            values = [run[name] for run in runs]
            several = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{several}" if values else "-")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
