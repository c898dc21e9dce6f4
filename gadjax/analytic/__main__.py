"""Comparison of objectives on closed-form teachers: the tables of docs/results/bench.md.

Run by `python -m gadjax.analytic`.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from gadjax.analytic.bench import Bench
from gadjax.analytic.result import Result, table
from gadjax.analytic.teachers import Gaussian, Mixture, posterior_map
from gadjax.objectives import (
    BOOT,
    CDM,
    CT,
    DMD,
    GAD,
    GDD,
    LADD,
    LCM,
    PSO,
    RCM,
    SIM,
    TBCM,
    TCM,
    TDM,
    TSCD,
    VSD,
    Consistency,
    ConsistencyDistillation,
    DecoupledDMD,
    Embedding,
    FDistill,
    FlashDMD,
    GADLift,
    MeanFlow,
    PhasedDMD,
    Regression,
    SiD,
    Term,
    TwinFlow,
    UniDAD,
    UniInstruct,
)
from gadjax.seeds import make_key

UPDATES, SEEDS = 1000, 3
FINE = 16  # steps of the teacher's maps in the objectives; the metrics use the exact map

REGRESSION, TANGENTS = Regression(steps=FINE), GAD(steps=FINE, loss="square")
ROWS: dict[str, Term] = {
    "Regression": REGRESSION,
    "Regression + 0.1 GAD": REGRESSION + 0.1 * TANGENTS,
    "DMD": DMD(),
    "DMD + GADLift": DMD() + GADLift(),
    "DMD + 0.3 GAD": DMD() + 0.3 * TANGENTS,
    "TDM": TDM(),
    "TDM + 0.3 GAD": TDM() + 0.3 * TANGENTS,
}
FULL_MAP: dict[str, Term] = {
    "DMD + 0.3 GAD(whole)": DMD() + 0.3 * GAD("whole", steps=2 * FINE, loss="square")
}
# Without guidance: DMD(guidance_range=...) is DMD here, and DecoupledDMD its matching alone.
METHODS: dict[str, Term] = {
    "DMD": DMD(),
    "SiD": SiD(),
    "VSD": VSD(),
    "SIM": SIM(),
    "DecoupledDMD": DecoupledDMD(),
    "UniInstruct": UniInstruct(),
    "FDistill": FDistill(),
    "CDM": CDM(),
    "PhasedDMD": PhasedDMD(),
    "CDM + 0.3 GAD": CDM() + 0.3 * TANGENTS,
    "PhasedDMD + 0.3 GAD": PhasedDMD() + 0.3 * TANGENTS,
    "DMD + 0.3 Embedding": DMD() + 0.3 * Embedding(),
    "UniDAD": UniDAD("teacher"),
    "GDD": GDD(),
    "GDD + 0.3 GAD": GDD() + 0.3 * TANGENTS,
}
# Trained at all times, and sampled in one step or with fresh noise, which the bench's student does
# not add between its steps: compared in one step.
CONSISTENCY: dict[str, Term] = {
    "Consistency": Consistency(),
    "ConsistencyDistillation": ConsistencyDistillation(),
    "TBCM": TBCM(points=4),
    "CT": CT(mean=0.2, std=1.6),
    "LCM": LCM(),
    "RCM": RCM(),
    "TSCD": TSCD(),
    "BOOT": BOOT(),
    "MeanFlow": MeanFlow(),
    "MeanFlow(power=1)": MeanFlow(power=1.0),
    "RCM + 2 DMD": RCM() + 2.0 * DMD(),
    "Consistency + 0.5 LADD": Consistency(images=True, variance_bins=16) + 0.5 * LADD((0,)),
    "MeanFlow + TwinFlow": MeanFlow() + TwinFlow(),
    "MeanFlow + TwinFlow + 0.3 GAD": MeanFlow() + TwinFlow() + 0.3 * TANGENTS,
}
# Second stages, in one step: each starts at the result of the first.
STAGES: dict[str, tuple[Term, Term]] = {
    "CT, then TCM": (CONSISTENCY["CT"], TCM(mean=0.2, std=1.6)),
    "DMD, then PSO": (DMD(), PSO()),
}
# Of the ODE in as many steps as the student has.
SEGMENTED: dict[str, Term] = {
    "TSCD": TSCD(segments=(8, 4)),
    "MeanFlow": MeanFlow(),
    "MeanFlow(power=1)": MeanFlow(power=1.0),
    "FlashDMD": FlashDMD(),
    "FlashDMD + 0.3 GAD": FlashDMD() + 0.3 * TANGENTS,
}
FEW = ("Regression", "DMD", "DMD + 0.3 GAD")


def exact(bench: Bench) -> Result:
    """Metrics of the teacher compared with itself: the error of the metrics."""
    alpha, sigma = (float(v) for v in bench.schedule.alpha_sigma(bench.times[0]))
    ode = partial(posterior_map, bench.teacher.posterior, alpha=alpha, sigma=sigma, steps=128)
    return bench.measure(lambda _, z: ode(z))


def compare(bench: Bench, rows: Mapping[str, Term], updates: int, seeds: int) -> str:
    """Table of the teacher, the untrained student and a student of each objective.

    Args:
      bench: teacher and student.
      rows: objectives by label.
      updates: student updates of a run.
      seeds: runs of each objective.
    """
    start = bench.init(make_key(0))
    results = {"teacher": [exact(bench)], "start": [bench.measure(bench.draw, start)]}
    for label, objective in rows.items():
        results[label] = [bench.fit(objective, updates, seed) for seed in range(seeds)]
    return table(results)


def staged(bench: Bench, updates: int, seeds: int) -> str:
    """Table of second stages, each with the updates of a run, beside their first stages."""
    results = {}
    for label, (first, second) in STAGES.items():
        starts = [bench.fit(first, updates, seed) for seed in range(seeds)]
        results[label.split(",")[0]] = starts
        results[label] = [
            bench.fit(second, updates, seed, start.params) for seed, start in enumerate(starts)
        ]
    return table(results)


def gauge(updates: int, seeds: int) -> str:
    """Table of students that start from the teacher's map behind a rotation of the noise.

    The start has the teacher's distribution, but not its correspondence of noise and sample.
    """
    bench = Bench(Gaussian.random(8))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    matrix = bench.reference.jacobian[0] @ rotation
    start = bench.linear(matrix, bench.teacher.mean)
    results = {"teacher": [exact(bench)], "start": [bench.measure(bench.draw, start)]}
    for label in ("DMD", "DMD + GADLift", "DMD + 0.3 GAD"):
        fits = [bench.fit(ROWS[label], updates, seed, start) for seed in range(seeds)]
        results[label] = fits
    return table(results)


def report(updates: int = UPDATES, seeds: int = SEEDS) -> Iterator[str]:
    """Parts of the report, each as soon as it is done."""
    yield f"Mean of {seeds} runs (and their range), {updates} updates each."
    for steps in (1, 4):
        for family in ("flow", "ddpm"):
            yield f"## A ring of 8 modes in 2 dimensions: {family}, {steps} step{'s'[: steps > 1]}"
            rows = ROWS | FULL_MAP if steps > 1 else ROWS
            yield compare(Bench(Mixture.ring(), family, steps), rows, updates, seeds)
    for steps in (1, 4):
        yield f"## Other methods: the ring, flow, {steps} step{'s'[: steps > 1]}"
        rows = METHODS | (CONSISTENCY if steps == 1 else SEGMENTED)
        yield compare(Bench(Mixture.ring(), "flow", steps), rows, updates, seeds)
    yield "## Second stages: the ring, flow, 1 step"
    yield staged(Bench(Mixture.ring(), "flow"), updates, seeds)
    for dim in (16, 64):
        yield f"## 8 random modes in {dim} dimensions: flow, 1 step"
        bench = Bench(Mixture.random(8, dim), width=128)
        yield compare(bench, {name: ROWS[name] for name in FEW}, updates, seeds)
    yield "## A gaussian in 8 dimensions, from the teacher's map behind a rotation: flow, 1 step"
    yield gauge(updates, seeds)


if __name__ == "__main__":
    for part in report():
        print(f"{part}\n", flush=True)
