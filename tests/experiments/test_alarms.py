"""The experiment of alarms: configs, rises of losses, and its table from workdirs."""

import json

import pytest

from gadjax.errors import InputError
from gadjax.experiments.alarms import (
    CASES,
    RISE,
    WINDOW,
    config_of,
    first_rise,
    read_run,
    write_table,
)
from gadjax.runtime.status import HEALTH, OF_TEACHER
from gadjax.training.health import BANDS


def test_configs():
    seeds = {config_of(case, seed).seed for case in CASES for seed in (0, 1)}
    assert seeds == {0, 1}
    good, fast = config_of("good", 0), config_of("rate", 0)
    assert fast.optim.lr > 10 * good.optim.lr and fast.objective == good.objective
    still = config_of("still_critic", 0)
    assert set(config_of("no_anchor", 0).objective) == set(still.objective) == {"dmd"}
    assert still.critic.lr < 1e-3 * good.critic.lr and still.optim.lr == good.optim.lr
    assert good.preview.features == "asset:shapes_features"
    with pytest.raises(InputError, match="case: found 'x'; expected one of good"):
        config_of("x", 0)


def test_first_rise():
    def rows(values):
        return [{"step": 2 * i, "loss": value} for i, value in enumerate(values)]

    falling = [4.0] * WINDOW + [2.0] * WINDOW
    assert first_rise(rows(falling), "loss") is None
    # The last window is of the new values alone, and just above the bound.
    assert first_rise(rows(falling + [RISE * 2 + 0.01] * WINDOW), "loss") == 2 * (3 * WINDOW - 1)
    assert first_rise(rows(falling + [None]), "loss") == 2 * 2 * WINDOW
    assert first_rise(rows([1.0]), "loss") is None


def test_the_table_of_finished_runs(tmp_path):
    """A run whose latents grow, beside one that is as the teacher's."""
    for case, growth in (("good", 0.0), ("rate", 1.1)):
        workdir = tmp_path / "runs" / f"{case}-0"
        workdir.mkdir(parents=True)
        (workdir / "status.json").write_text(json.dumps({"status": "done"}))
        rows = []
        for step in (0, 10, 20):
            row = {f"{name}{end}": 1.0 for name in BANDS for end in ("", OF_TEACHER)}
            row["x0_rms"] = float(1 + growth * BANDS["x0_rms"].width * step / 10)
            if case == "rate":  # a run without features
                row = {key: value for key, value in row.items() if not key.startswith("vendi")}
            rows.append({"step": step} | row | {"alarms": []})
        (workdir / HEALTH).write_text("".join(json.dumps(row) + "\n" for row in rows))
        logged = [{"step": n, "student/loss": 1.0, "dmd/gap": 1.0} for n in range(WINDOW)]
        text = "".join(json.dumps(row) + "\n" for row in logged)
        (workdir / "metrics.jsonl").write_text(text)
    found = read_run(tmp_path / "runs" / "rate-0")
    assert found["alarms"] == {"x0_rms": 10} and "student/loss" not in found["rises"]
    (tmp_path / "runs" / "rate-1").mkdir()  # not finished
    write_table(tmp_path / "runs", tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    column = 2 + list(BANDS).index("x0_rms")
    cells = {line.split(" | ")[0]: line.split(" | ") for line in lines if line.startswith("| ")}
    first = [line.strip("| ").split(" | ") for line in lines if line.startswith("| rate | 1 |")]
    assert first[0][column] == "10" and "not finite" not in "\n".join(lines)
    vendi = 2 + list(BANDS).index("vendi")
    assert first[0][vendi] == "." and cells["| rate"][vendi] == "" != cells["| good"][vendi]
    assert {"| good", "| rate", "| rate: teacher"} <= set(cells) and len(first) == 1
