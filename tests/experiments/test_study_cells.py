"""Cells of the study as configs, and refusals."""

import pytest

from gadjax.errors import InputError
from gadjax.experiments import study_cells
from gadjax.training.checks import student_times
from gadjax.training.config import read_config


def test_every_base_has_its_rows():
    cells = study_cells.cells()
    assert len(set(cells)) == len(cells)
    for base in ("dmd", "sid", "tdm"):
        for added in study_cells.COMBINED:
            assert f"flow/{base}_{added}" in cells
    assert {"flow/regression_none", "flow/script_half", "flow/whole", "flow/dmd_long"} <= set(cells)
    assert not any("anchor" in cell for cell in cells if cell.startswith("flow_1_step"))


IN_FAMILIES = [cell for cell in study_cells.cells() if not cell.startswith("methods/")]


@pytest.mark.parametrize("cell", IN_FAMILIES[:: len(IN_FAMILIES) // 12])
def test_a_cell_is_a_config(cell):
    config = study_cells.config_of(cell)
    family = study_cells.FAMILIES[cell.split("/")[0]]
    assert config.guidance == family.guidance and config.optim.decay == config.steps
    assert student_times(config) == family.times
    for term in {"regression", "anchor"} & set(config.objective):
        assert "/map_" in cell or config.objective[term].steps == family.map_steps
    assert read_config([f"--config=configs/study.py:{cell}"]).to_dict() == config.to_dict()


def test_a_method_is_a_variant_of_its_config_file():
    cells = [cell for cell in study_cells.cells() if cell.startswith("methods/")]
    settings = []
    for cell in cells:
        name = cell.removeprefix("methods/")
        config = study_cells.config_of(cell)
        settings.append((config.teacher, config.student.steps))
        if not name.endswith(study_cells.WITH_TERMS):
            assert config.to_dict() == read_config([f"--config=methods:{name}"]).to_dict()
            continue
        added = {"gad"} | ({"anchor"} if config.student.steps > 1 else set())
        alone = study_cells.config_of(cell.removesuffix(study_cells.WITH_TERMS))
        assert set(config.objective) - set(alone.objective) == added
        assert config.objective.gad.weight == study_cells.GAD["weight"]
    # A table's rows of one teacher and grid stand together.
    changes = sum(a != b for a, b in zip(settings, settings[1:], strict=False))
    assert changes == len(set(settings)) - 1 == 4
    assert {"methods/dmd_fresh", "methods/rcm_gad_anchor", "methods/dmm"} <= set(cells)


def test_a_change_changes_one_term():
    objectives = study_cells.objectives()
    base = objectives["dmd_polar_anchor"]
    for name, changed in study_cells.CHANGES.items():
        assert {**base, **changed} == objectives[name]
        together = name.startswith("map_") or name == "strong"  # one walk of the teacher for both
        assert sum(objectives[name][term] != base[term] for term in base) == 1 + together


@pytest.mark.parametrize("cell", ["flow", "flow/dmd_nothing", "river/dmd_none", "flow:dmd_none"])
def test_another_cell_is_refused(cell):
    with pytest.raises(InputError, match="cell: found .* expected FAMILY/VARIANT"):
        study_cells.config_of(cell)
