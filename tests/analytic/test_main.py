from collections import Counter

import numpy as np
import pytest

from gadjax.analytic import Bench, Result
from gadjax.analytic import __main__ as main

PERFECT = Result(1.0, 1.0, 0.0, 0.0, 0.0, 1.0, np.zeros((1, 2)), np.zeros((1, 2)), {})


@pytest.mark.slow
def test_the_report_has_a_row_for_every_objective_in_every_setting(monkeypatch):
    fits = []

    def fit(bench, objective, updates, seed, start=None):
        key = bench.family, bench.steps, bench.teacher.dim
        fits.append((key, objective, updates, seed, start is None))
        return PERFECT

    monkeypatch.setattr(Bench, "fit", fit)
    monkeypatch.setattr(Bench, "measure", lambda *given: PERFECT)
    head, *parts = main.report(updates=7, seeds=2)
    assert head == "Mean of 2 runs (and their range), 7 updates each."
    titles, tables = parts[::2], parts[1::2]
    assert len(titles) == 10 and all(title.startswith("## ") for title in titles)
    assert titles[0].endswith("flow, 1 step") and titles[3].endswith("ddpm, 4 steps")
    rows = [[line.split(" | ")[0][2:] for line in table.splitlines()[2:]] for table in tables]
    stages = rows.pop(6)  # begins with the first stages, in place of teacher and start
    assert stages == [s for label in main.STAGES for s in (label.split(",")[0], label)]
    assert all(row[:2] == ["teacher", "start"] for row in rows)
    assert rows[0][2:] == list(main.ROWS) and rows[2][2:] == [*main.ROWS, *main.FULL_MAP]
    assert rows[4][2:] == [*main.METHODS, *main.CONSISTENCY]
    assert rows[5][2:] == [*main.METHODS, *main.SEGMENTED]
    assert rows[6][2:] == rows[7][2:] == list(main.FEW)
    # Every row but the first two is the mean over the seeds of one objective.
    assert len(fits) == 2 * (len(stages) + sum(len(row) - 2 for row in rows))
    assert Counter(seed for _, _, _, seed, _ in fits) == {0: len(fits) // 2, 1: len(fits) // 2}
    assert {updates for _, _, updates, _, _ in fits} == {7}
    assert {key for key, *_, fresh in fits if not fresh} == {("flow", 1, 8), ("flow", 1, 2)}
    dims = {key for key, *_ in fits if key[2] != 2}
    assert dims == {("flow", 1, 16), ("flow", 1, 64), ("flow", 1, 8)}
