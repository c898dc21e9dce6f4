"""The study: its cells, refusals, training, and the table of finished cells."""

import json

import jax
import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.experiments import study, study_runs, study_tables
from gadjax.training.checks import student_times
from gadjax.training.config import read_config
from gadjax.training.loop import train
from gadjax.training.setup import prepare
from gadjax.training.workdir import read_trained


def test_every_base_has_its_rows():
    cells = study.cells()
    assert len(set(cells)) == len(cells)
    for base in ("dmd", "sid", "tdm"):
        for added in study.COMBINED:
            assert f"flow/{base}_{added}" in cells
    assert {"flow/regression_none", "flow/script_half", "flow/whole", "flow/dmd_long"} <= set(cells)
    assert not any("anchor" in cell for cell in cells if cell.startswith("flow_1_step"))


IN_FAMILIES = [cell for cell in study.cells() if not cell.startswith("methods/")]


@pytest.mark.parametrize("cell", IN_FAMILIES[:: len(IN_FAMILIES) // 12])
def test_a_cell_is_a_config(cell):
    config = study.config_of(cell)
    family = study.FAMILIES[cell.split("/")[0]]
    assert config.guidance == family.guidance and config.optim.decay == config.steps
    assert student_times(config) == family.times
    for term in {"regression", "anchor"} & set(config.objective):
        assert config.objective[term].steps == family.map_steps
    assert read_config([f"--config=configs/study.py:{cell}"]).to_dict() == config.to_dict()


def test_a_method_is_a_variant_of_its_config_file():
    cells = [cell for cell in study.cells() if cell.startswith("methods/")]
    settings = []
    for cell in cells:
        name = cell.removeprefix("methods/")
        config = study.config_of(cell)
        settings.append((config.teacher, config.student.steps))
        if not name.endswith(study.WITH_TERMS):
            assert config.to_dict() == read_config([f"--config=methods:{name}"]).to_dict()
            continue
        added = {"gad"} | ({"anchor"} if config.student.steps > 1 else set())
        alone = study.config_of(cell.removesuffix(study.WITH_TERMS))
        assert set(config.objective) - set(alone.objective) == added
        assert config.objective.gad.weight == study.GAD["weight"]
    # A table's rows of one teacher and grid stand together.
    changes = sum(a != b for a, b in zip(settings, settings[1:], strict=False))
    assert changes == len(set(settings)) - 1 == 4
    assert {"methods/dmd_fresh", "methods/rcm_gad_anchor", "methods/dmm"} <= set(cells)


def test_a_change_changes_one_term():
    objectives = study.objectives()
    base = objectives["dmd_polar_anchor"]
    for name, changed in study.CHANGES.items():
        assert {**base, **changed} == objectives[name]
        together = name.startswith("map_")  # one walk of the teacher for both
        assert sum(objectives[name][term] != base[term] for term in base) == 1 + together


@pytest.mark.slow
def test_a_longer_map_costs_more():
    costs = [cost_of(f"flow/{name}") for name in ("map_1", "map_2", "dmd_polar_anchor", "map_8")]
    assert costs == sorted(costs) and costs[0] < 0.8 * costs[2]


def cost_of(cell):
    return study_runs.evaluations(prepare(study.config_of(cell)))


@pytest.mark.slow
def test_longer_rows_take_the_evaluations_of_the_row_they_are_compared_with():
    cost = cost_of("flow/dmd_polar_anchor")
    for name, (of, share) in study.LONGER.items():
        base = cost_of(f"flow/{of}")
        assert share == pytest.approx(cost / base, rel=0.05)
        assert study.config_of(f"flow/{name}").steps == round(800 * share)


@pytest.mark.parametrize("cell", ["flow", "flow/dmd_nothing", "river/dmd_none", "flow:dmd_none"])
def test_another_cell_is_refused(cell):
    with pytest.raises(InputError, match="cell: found .* expected FAMILY/VARIANT"):
        study.config_of(cell)


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
    study_tables.write_tables(tmp_path, study.cells())
    text = (tmp_path / "README.md").read_text()
    assert text.count("\n## ") == len(study.FAMILIES) + 1 and "--seeds 3" in text
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
