"""Numbers of outside scripts in the report."""

import json

import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.evaluation.external import read_external, with_external
from gadjax.evaluation.report import as_dict, as_markdown
from gadjax.evaluation.results import Evaluation, Row
from gadjax.formats.sampling_config import SamplingConfig

RESULT = {"metric": "GenEval", "version": "commit 16f1681", "row": "student", "value": 0.65, "n": 8}


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def evaluation():
    images = np.zeros((2, 1, 8, 8, 3), np.float32)
    sampling = SamplingConfig(2, None, 1.0, 6)
    rows = [Row(key, key, sampling, 2, images, {}) for key in ("teacher", "student")]
    return Evaluation(rows, {}, {})


def test_results_stand_in_the_report(tmp_path):
    results = [
        RESULT,
        RESULT | {"row": "teacher", "value": 0.5, "per_prompt": [0.25, 0.75]},
        RESULT | {"metric": "HPSv2.1", "low": 30, "high": 31, "value": 30.5},
    ]
    read = read_external(write(tmp_path / "x.json", {"results": results}), 2)
    report = with_external(evaluation(), read)
    teacher, student = report.rows
    assert student.metrics["external/GenEval"] == (0.65, None, None)
    assert student.metrics["external/HPSv2.1"] == (30.5, 30.0, 31.0)
    # Over two prompts: a resample has both, or one of them twice.
    assert teacher.metrics["external/GenEval"] == (0.5, 0.25, 0.75)
    text = as_markdown(report, {})
    assert "## Outside scripts" in text and "| GenEval | 0.500 (0.250 to 0.750) | 0.650 |" in text
    assert "by an outside script, commit 16f1681; 8 pictures" in text
    metrics = as_dict(report, {})["rows"]["student"]["metrics"]
    assert metrics["external/GenEval"]["value"] == 0.65


def test_a_value_that_is_no_mean_of_the_prompts_has_no_interval(tmp_path):
    result = RESULT | {"per_prompt": [0.0, 1.0]}
    read = read_external(write(tmp_path / "x.json", result), 2)
    assert with_external(evaluation(), read).rows[1].metrics["external/GenEval"].low is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "found no results"),
        ({"results": []}, "found no results"),
        ({"results": [3]}, "result 1: found 3; expected a JSON object"),
        (RESULT | {"metric": "a|b"}, r"metric: found 'a\|b'"),
        (RESULT | {"metric": "<img onerror=x>"}, "metric: found"),
        (RESULT | {"version": "x\n# y"}, "version: found"),
        (RESULT | {"version": None}, "version: found None"),
        (RESULT | {"row": "__proto__"}, "row: found '__proto__'"),
        (RESULT | {"value": float("nan")}, "value: found nan"),
        (RESULT | {"value": True}, "value: found True"),
        (RESULT | {"n": 0}, "n: found 0"),
        (RESULT | {"low": 1}, "low, high: found"),
        (RESULT | {"low": 2, "high": 1}, "low, high: found"),
        (RESULT | {"per_prompt": [1, 2, 3]}, "per_prompt: found another list; expected 2"),
        (RESULT | {"per_prompt": [1, "2"]}, "per_prompt: found"),
        (RESULT | {"more": 1}, "more: found an unknown key"),
        ({"results": [RESULT, RESULT]}, "found GenEval of student twice"),
    ],
)
def test_refusals(value, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        read_external(write(tmp_path / "x.json", value), 2)
    assert str(caught.value).isprintable() and "x.json" in str(caught.value)


def test_a_row_that_is_not_there(tmp_path):
    read = read_external(write(tmp_path / "x.json", RESULT | {"row": "student_2"}), 2)
    with pytest.raises(
        InputError, match="--import: found row 'student_2'; expected one of teacher"
    ):
        with_external(evaluation(), read)
