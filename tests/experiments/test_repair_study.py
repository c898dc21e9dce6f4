import json
import shutil

import numpy as np
import pytest

from gadjax import assets
from gadjax.errors import InputError
from gadjax.evaluation.results import EvaluationConfig
from gadjax.experiments import repair_study, study
from gadjax.experiments.repair_study import VARIANTS, config_of, write_table
from gadjax.experiments.study_runs import Evaluator, evaluations
from gadjax.experiments.study_tables import METRICS
from gadjax.objectives import TERMS, build
from gadjax.training.config import read_config
from gadjax.training.setup import prepare


def as_student(folder, steps):
    """The bundled teacher as if it were a student of few steps."""
    shutil.copytree(assets.resolve("asset:shapes_flow_teacher"), folder)
    (folder / "gadjax.json").write_text(json.dumps({"steps": steps, "guidance": 1.0}))
    return str(folder)


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    return as_student(tmp_path_factory.mktemp("patient") / "student", 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_config(variant, patient):
    config = config_of(variant, patient)
    total = build(config.objective, TERMS, config.student.timesteps)
    assert not total.needs.critic and config.optim.decay == config.steps
    assert config.student.lora.rank == {"rank_4": 4, "rank_64": 64, "whole_weights": 0}.get(
        variant, 16
    )


def test_the_steps_are_the_patient_s(patient, tmp_path):
    """Those of its scheduler, where gadjax.json has their number alone."""
    times = config_of("all", patient).student.timesteps
    assert times == pytest.approx((999.0, 749.25, 499.5, 249.75))
    student = config_of("all", as_student(tmp_path / "two", 2)).student
    assert student.steps == 2 and student.timesteps == pytest.approx((999.0, 499.5))
    with pytest.raises(InputError, match="found no few-step student"):
        config_of("all", "asset:shapes_flow_teacher")


def test_unknown_variants_are_named():
    with pytest.raises(InputError, match="^variant: found 'other'; expected one of regression_"):
        config_of("other", "asset:shapes_flow_teacher")


def test_the_table_has_means_and_what_is_missing(tmp_path):
    def runs(*values):
        return [dict.fromkeys(METRICS, value) for value in values]

    teachers = {"teacher": runs(1.0)[0], "teacher_few": runs(0.25)[0]}
    write_table(tmp_path)
    assert not list(tmp_path.iterdir())
    row = {"variant": "polar", "runs": runs(0.5, 0.7), "teachers": teachers, "date": "2026-11-30"}
    for name, values in {
        "patient": {"variant": "patient", "runs": runs(0.125)},
        "polar": row | {"evaluations": 12.34},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    write_table(tmp_path)
    text = (tmp_path / "README.md").read_text()
    reach = 12.706 * np.std([0.5, 0.7], ddof=1) / 2**0.5
    assert f"| polar | 2 | 0.600 ± {reach:.3f} |" in text and "| 12.3 |" in text
    assert "| patient | 1 | 0.125 |" in text and "| teacher, 20 steps |  | 1.000 |" in text
    assert "Not run yet: regression_tether, regression, " in text


@pytest.fixture
def small(monkeypatch):
    """Evaluator of two pictures of two prompts; runs of two steps of two samples."""
    for module in (repair_study, study):
        full = module.config_of

        def short(*of, full=full):
            config = full(*of)
            config.steps, config.batch = 2, 2
            return config

        monkeypatch.setattr(module, "config_of", short)
    evaluate = Evaluator()
    evaluate.prompts = evaluate.prompts[:2]
    evaluate.evaluation_config = EvaluationConfig(2, 0, library=0, strips=0)
    return evaluate


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["regression_tether", "whole_weights"])
def test_a_row_of_repairs(small, tmp_path, variant, patient):
    """Of adapters on the patient, whose base is not the teacher's, and of whole weights."""
    repair_study.run_variant(variant, patient, 2, tmp_path, small)
    row = json.loads((tmp_path / f"{variant}.json").read_text())
    assert len(row["runs"]) == 2 and row["runs"][0]["adherence"] >= 0


@pytest.mark.slow
def test_a_cell_of_adapters(small, tmp_path):
    study.run_cell("flow_adapters_int8/regression_none", 2, tmp_path, small)
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text())["runs"]) == 2


def test_the_default_is_that_of_the_command(patient):
    config, ours = read_config(["--config=repair"]), config_of("regression_tether", patient)
    weighted = {k: v for k, v in config.objective.to_dict().items() if v.get("weight", 1.0)}
    assert ours.objective.to_dict() == weighted


@pytest.mark.slow
def test_a_row_of_equal_cost_takes_the_default_s_evaluations(patient):
    def cost(variant):
        config = config_of(variant, patient)
        return config.steps * evaluations(prepare(config))

    assert cost("seed_difference_4_tether_148") == pytest.approx(
        cost("regression_tether"), rel=0.01
    )
