"""Evaluations made up for the tests of reports: random pictures, no model."""

import numpy as np

from gadjax.evaluation.metric_catalogue import catalogue
from gadjax.evaluation.oracles import WORLDS
from gadjax.evaluation.results import Evaluation, Row
from gadjax.evaluation.statistics import Estimate
from gadjax.evaluation.strips import POINTS, WAYS
from gadjax.formats.sampling_config import SamplingConfig

PROMPTS, SEEDS, SIDE = 12, 3, 8
METRICS = {
    "adherence": Estimate(0.5, 0.4, 0.6),
    "frechet": Estimate(2.0),
    "vendi_ratio": Estimate(0.9, 0.8, 1.1),
}


def made_up(labels=("student",), prompts=PROMPTS, side=SIDE, metrics=METRICS) -> Evaluation:
    """Evaluation of a teacher, its few steps, and a student for each label; the first student
    differs most at the last prompt, the second at the first, and so on."""
    rng = np.random.default_rng(0)
    keys = ["teacher", "teacher_few"]
    keys += ["student" if n == 0 else f"student_{n + 1}" for n in range(len(labels))]
    rows = []
    for i, (key, label) in enumerate(zip(keys, ["teacher", "teacher", *labels], strict=True)):
        images = rng.integers(0, 256, (prompts, SEEDS, side, side, 3), np.uint8)
        apart = np.arange(prompts) / prompts
        strips = rng.integers(0, 256, (2, len(WAYS), POINTS, side, side, 3), np.uint8)
        apart = None if i == 0 else apart if i % 2 == 0 else apart[::-1]
        taken = {k: m for k, m in metrics.items() if i or not k.endswith("_ratio")}
        facts = f"{label}, 4 steps", SamplingConfig(4), 4, images, taken
        rows.append(Row(key, *facts, apart, strips))
    absent = {"control": "no moves asked for"}
    return Evaluation(rows, catalogue(WORLDS["none"]), absent, None, (0, prompts - 1))


def texts(prompts=PROMPTS) -> list[str]:
    return [f"prompt {p}" for p in range(prompts)]
