"""`python -m gadjax.analytic`: the tables of docs/results/bench.md."""

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from gadjax.analytic.bench import Bench
from gadjax.analytic.result import Result, table
from gadjax.analytic.teachers import Gaussian, Mixture, posterior_map
from gadjax.objectives import DMD, GAD, TDM, GADLift, Regression, Term
from gadjax.seeds import make_key

UPDATES, SEEDS = 1000, 3
FINE = 16  # steps of the teacher's maps; the metrics' own is exact

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
WHOLE: dict[str, Term] = {
    "DMD + 0.3 GAD(whole)": DMD() + 0.3 * GAD("whole", steps=2 * FINE, loss="square")
}
FEW = ("Regression", "DMD", "DMD + 0.3 GAD")


def exact(bench: Bench) -> Result:
    """The teacher beside itself: what is left is the metrics' own error."""
    alpha, sigma = (float(v) for v in bench.schedule.alpha_sigma(bench.times[0]))
    walk = partial(posterior_map, bench.teacher.posterior, alpha=alpha, sigma=sigma, steps=128)
    return bench.measure(lambda _, z: walk(z))


def compare(bench: Bench, rows: Mapping[str, Term], updates: int, seeds: int) -> str:
    start = bench.init(make_key(0))
    found = {"teacher": [exact(bench)], "start": [bench.measure(bench.draw, start)]}
    for label, objective in rows.items():
        found[label] = [bench.fit(objective, updates, seed) for seed in range(seeds)]
    return table(found)


def gauge(updates: int, seeds: int) -> str:
    """From the teacher's own map behind a rotation of the noise, which draws the same pictures."""
    bench = Bench(Gaussian.random(8))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    matrix = bench.reference.jacobian[0] @ rotation
    start = bench.linear(matrix, bench.teacher.mean)
    found = {"teacher": [exact(bench)], "start": [bench.measure(bench.draw, start)]}
    for label in ("DMD", "DMD + GADLift", "DMD + 0.3 GAD"):
        fits = [bench.fit(ROWS[label], updates, seed, start) for seed in range(seeds)]
        found[label] = fits
    return table(found)


def report(updates: int = UPDATES, seeds: int = SEEDS) -> Iterator[str]:
    """The parts of the report as they are done."""
    yield f"Mean of {seeds} runs (and their range), {updates} updates each."
    for steps in (1, 4):
        for family in ("flow", "ddpm"):
            yield f"## A ring of 8 modes in 2 dimensions: {family}, {steps} step{'s'[: steps > 1]}"
            rows = ROWS | WHOLE if steps > 1 else ROWS
            yield compare(Bench(Mixture.ring(), family, steps), rows, updates, seeds)
    for dim in (16, 64):
        yield f"## 8 random modes in {dim} dimensions: flow, 1 step"
        bench = Bench(Mixture.random(8, dim), width=128)
        yield compare(bench, {name: ROWS[name] for name in FEW}, updates, seeds)
    yield "## A gaussian in 8 dimensions, from the teacher's map behind a rotation: flow, 1 step"
    yield gauge(updates, seeds)


if __name__ == "__main__":
    for part in report():
        print(f"{part}\n", flush=True)
