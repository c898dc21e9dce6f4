"""Sizes and results of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gadjax.evaluation.metric_catalogue import Metric
from gadjax.evaluation.noise_control import ControlResults
from gadjax.evaluation.statistics import Estimate
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.pipelines.sampling import BATCH


@dataclass(frozen=True)
class EvaluationConfig:
    """Sizes of an evaluation.

    seeds: pictures of each prompt.
    tangents: noise directions for each prompt, each at a seed of its own; 0 omits noise
      sensitivity.
    batch: pictures at a time.
    library: noises for the noise-control tasks, where the world has them; 0 omits these.
    moves: layout targets (a shape moved by its noise), at most one for each noise of the library;
      0 omits layout control, which costs more than all else.
    strips: prompts that are also drawn along a path between two noises and along a direction.
    shared_noise: let all prompts start from the same noise of a seed, the first one's, for the
      seed probe of named extractors.
    """

    seeds: int = 8
    tangents: int = 1
    batch: int = BATCH
    library: int = 64
    moves: int = 0
    strips: int = 4
    shared_noise: bool = False


@dataclass(frozen=True)
class Row:
    """Pictures (uint8) and metrics of one model.

    images_PSHWC: seed s of prompt p has the same noise in every row.
    evaluations: network evaluations for one picture.
    differences_P: difference from the teacher for each prompt (`relative_difference`).
    strips_KMNHWC: pictures of the K prompts in `Evaluation.strips` (`gadjax.evaluation.strips`).
    """

    key: str
    label: str
    sampling: SamplingConfig
    evaluations: int
    images_PSHWC: np.ndarray
    metrics: dict[str, Estimate]
    differences_P: np.ndarray | None = None
    strips_KMNHWC: np.ndarray | None = None


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation: rows, metrics and noise-control pictures.

    rows: the teacher, the teacher in the students' numbers of steps, the students.
    catalogue: every metric of the world, in the order of the report.
    absent: metric that could not be taken -> reason.
    control: None where the world has no noise-control tasks or none were asked for.
    strips: indices of the prompts that have strips.
    """

    rows: list[Row]
    catalogue: dict[str, Metric]
    absent: dict[str, str]
    control: ControlResults | None = None
    strips: Sequence[int] = ()
