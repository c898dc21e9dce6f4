"""The study: training, evaluation, and the table of finished cells."""

import json
import sys
import time

import jax
import numpy as np
import psutil
import pytest
from programs import ROOT

from gadjax.experiments import study, study_cells, study_runs, study_tables
from gadjax.training.config import read_config
from gadjax.training.loop import train
from gadjax.training.setup import prepare
from gadjax.training.workdir import read_trained


@pytest.mark.slow
def test_a_longer_map_costs_more():
    costs = [cost_of(f"flow/{name}") for name in ("map_1", "map_2", "dmd_polar_anchor", "map_8")]
    assert costs == sorted(costs) and costs[0] < 0.8 * costs[2]


def cost_of(cell):
    return study_runs.evaluations(prepare(study_cells.config_of(cell)))


@pytest.mark.slow
def test_longer_rows_take_the_evaluations_of_the_row_they_are_compared_with():
    cost = cost_of("flow/dmd_polar_anchor")
    for name, (of, share) in study_cells.LONGER.items():
        base = cost_of(f"flow/{of}")
        assert share == pytest.approx(cost / base, rel=0.05)
        assert study_cells.config_of(f"flow/{name}").steps == round(800 * share)


@pytest.mark.slow
def test_a_terminated_study_leaves_no_worker(tmp_path):
    command = [sys.executable, "-m", "gadjax.experiments.study", "flow/dmd_none", "--seeds", "1"]
    process = psutil.Popen([*command, "--out", str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 120
    # The pool's worker, beside the process that tracks resources.
    while len(workers := process.children()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert not list(tmp_path.iterdir())


def distance(a, b) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(np.sqrt(sum(np.sum((x - y) ** 2) for x, y in pairs)))


@pytest.mark.slow
def test_seeds_together_are_the_runs_of_the_train_command(config, tmp_path):
    """Two seeds in one program, and one of them as `gadjax train` trains it."""
    config = read_config([f"--config={config}:all"])
    config.optim.update(warmup=1, decay=config.steps)
    config.critic.updates = 2
    students, curves = study_runs.train_seeds(prepare(config), (0, 3))
    config.seed = 3
    train(config, tmp_path / "run")
    params = read_trained(tmp_path / "run").params
    # Adam moves by its rate however small a gradient is, so single numbers may differ by rounding;
    # the other seed is another run.
    assert distance(students[1], params) < 0.01 * distance(*students)
    assert "gad/cosine" in curves


def test_a_student_is_evaluated_beside_its_earlier_expert():
    config = study_cells.config_of("methods/phased_dmd_second")
    config.student.earlier_expert = config.teacher
    run = prepare(config)
    student = jax.tree.map(lambda x: x + 1, run.initial_params["student"])
    experts = study.complete(run, student)
    assert experts.late is student and experts.boundary == (749.25 + 499.5) / 2
    for a, b in zip(*map(jax.tree.leaves, (experts.early, student)), strict=True):
        np.testing.assert_allclose(a + 1, b, rtol=1e-6)
    alone = prepare(study_cells.config_of("methods/phased_dmd_first"))
    assert study.complete(alone, student) is student


def row(cell, values, cost):
    runs = [dict.fromkeys(study_tables.METRICS, value) for value in values]
    teachers = {"teacher": {"adherence": 0.9}, "teacher_few": {"adherence": 0.6}}
    return {
        "cell": cell,
        "config": {"teacher": "asset:shapes_flow_teacher", "student": {"steps": 4}},
        "seeds": list(range(len(values))),
        "runs": runs,
        "teachers": teachers,
        "evaluations": cost,
        "date": "2026-11-30",
        "device": "cpu",
    }


def test_the_table_has_finished_cells_and_names_the_rest(tmp_path):
    for cell, values, cost in (
        ("flow/dmd_none", [0.5, 0.6, 0.7], 20.0),
        ("flow/dmd_polar", [0.8], 40.0),
    ):
        path = study_tables.row_path(tmp_path, cell)
        path.write_text(json.dumps(row(cell, values, cost)))
    study_tables.write_tables(tmp_path, study_cells.cells())
    text = (tmp_path / "README.md").read_text()
    assert text.count("\n## ") == len(study_cells.FAMILIES) + 1 and "--seeds 3" in text
    first = text.split("## flow\n")[1].split("## ")[0]
    lines = {line.split("|")[1].strip(): line for line in first.splitlines() if "|" in line}
    # Student's t with two degrees of freedom: 4.303 * 0.1 / sqrt(3).
    assert "| 3 | 0.600 ± 0.248" in lines["dmd"]
    assert "| 1 | 0.800 |" in lines["dmd polar"] and "40.0 (x 2.00)" in lines["dmd polar"]
    assert "0.900" in lines["teacher, 20 steps"]
    assert "tdm_none" in first.split("Not run yet:")[1]


def test_the_command_skips_finished_cells_and_stops_at_its_budget(tmp_path, monkeypatch, capsys):
    path = study_tables.row_path(tmp_path, "flow/dmd_none")
    path.write_text(json.dumps(row("flow/dmd_none", [0.5], 20.0)))
    monkeypatch.setattr("sys.argv", ["study", "flow/dmd_none", f"--out={tmp_path}"])
    assert study.main() == 0 and capsys.readouterr().out == ""
    cell, reason = study.work("flow/dmd_gad", 1, tmp_path, until=0.0)
    assert cell == "flow/dmd_gad" and "budget" in reason
    assert not study_tables.row_path(tmp_path, cell).exists()
