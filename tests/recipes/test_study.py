"""The study's list of cells, what it refuses, and the table it makes of finished ones."""

import json

import pytest

from gadjax.errors import InputError
from gadjax.recipes import study
from gadjax.training.setup import student_times


def test_every_base_has_its_rows_in_every_family_and_seed():
    cells = study.cells()
    assert len(set(cells)) == len(cells)
    for seed in (0, 1, 2):
        for base in ("dmd", "sid", "tdm", "regression"):
            for added in ("none", "gad", "anchor", "both"):
                for family in ("eps", "flow"):
                    assert f"{family}:{base}_{added}:{seed}" in cells
            assert f"one_step:{base}_gad:{seed}" in cells
            assert f"one_step:{base}_anchor:{seed}" not in cells  # it needs a second step
    assert {"eps:script:0", "eps:script_half:0", "eps:whole:0"} <= set(cells)


@pytest.mark.parametrize("cell", study.cells()[:: len(study.cells()) // 12])
def test_a_cell_is_a_config(cell):
    config = study.config_of(cell)
    assert config.seed == int(cell.split(":")[2]) and config.steps == 600
    assert len(student_times(config)) == (1 if cell.startswith("one_step") else 4)
    if cell.startswith("one_step") and "gad" in config.objective:
        assert config.objective.gad.steps == 8


def test_a_change_changes_one_term():
    objectives = study.objectives()
    for name, changed in study.CHANGES.items():
        found = objectives[name]
        assert {**objectives["dmd_both"], **changed} == found
        assert sum(found[term] != objectives["dmd_both"][term] for term in found) == 1


@pytest.mark.parametrize("cell", ["eps:dmd_none", "eps:dmd_nothing:0", "eps:dmd_none:7"])
def test_another_cell_is_refused(cell):
    with pytest.raises(InputError, match="cell: found .* expected FAMILY:VARIANT:SEED"):
        study.config_of(cell)


def row(value, cost, seed):
    metric = {"value": value, "low": value - 0.1, "high": value + 0.1}
    of = {"label": "student, 4 steps", "metrics": {name: metric for name in study.SHOWN}}
    teacher = {"label": "teacher, 20 steps", "metrics": {"adherence": metric | {"value": 0.9}}}
    rows = {"student": of, "teacher": teacher, "teacher_few": teacher}
    return {"rows": rows, "evaluations": cost, "seconds": cost / 10}


def test_the_table_has_every_row_and_says_which_were_not_run(tmp_path):
    for name, value, cost in (
        ("eps-dmd_none-0", 0.5, 20.0),
        ("eps-dmd_both-0", 0.6, 40.0),
        ("eps-dmd_both-1", 0.8, 40.0),
    ):
        found = row(value, cost, int(name[-1]))
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    study.write_table(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("## Teacher") == len(study.TEACHERS)
    first = text.split("## Teacher")[1].splitlines()
    lines = {line.split("|")[1].strip(): line for line in first if "|" in line}
    assert "| 1 | 0.500 (0.40–0.60)" in lines["dmd"]
    # Two seeds: mean and spread; cost beside the base's.
    assert "| 2 | 0.700 ± 0.141" in lines["dmd both"] and "40 (x 2.00)" in lines["dmd both"]
    assert "0.900" in lines["teacher, 20 steps"]
    assert "not run" in lines["sid both"] and "not run" in lines["whole"]
