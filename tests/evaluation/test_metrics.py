"""Metrics of a row, and those that are reported as absent."""

from dataclasses import replace

import numpy as np
import pytest

from gadjax.evaluation.metric_catalogue import catalogue
from gadjax.evaluation.metrics import ModelOutputs, absent_metrics, row_metrics
from gadjax.evaluation.oracles import Oracle, World

BEFORE = ("prompts", "diversity", "seeds", "sensitivity")
NAMES = [name for name, metric in catalogue(World()).items() if metric.group in BEFORE]

PROMPTS = ["a dot", "a bar", "anything"]


def parse(caption):
    words = caption.split()[1:]
    return {"shape": words[0]} if words else {}


ORACLE = World(Oracle(("shape", "ink"), lambda images: None, parse))
BOTH = World(ORACLE.oracle, lambda images: None)


def drawn(seed, width=4, tangents=2, oracle=True):
    rng = np.random.default_rng(seed)
    words = np.array([["", ""], ["dot", "red"], ["dot", "blue"], ["bar", "red"]])
    return ModelOutputs(
        rng.uniform(-1, 1, (3, 5, 8, 8, 3)),
        rng.standard_normal((3, 5, width)) if width else None,
        rng.standard_normal((tangents, 3, 4, 4, 2)) if tangents else None,
        words[rng.integers(0, 4, (3, 5))] if oracle else None,
        rng.uniform(-1, 1, (2, 5, 8, 8, 3)),
        rng.standard_normal((2, 5, width)) if width else None,
    )


@pytest.mark.parametrize(
    ("world", "width", "tangents", "count"),
    [(BOTH, 4, 2, 0), (BOTH, 4, 0, 2), (BOTH, 15, 2, 2), (ORACLE, 0, 2, 9), (World(), 0, 0, 14)],
)
def test_every_metric_is_taken_or_absent_for_a_reason(world, width, tangents, count):
    teacher, student = (drawn(i, width, tangents, world.oracle) for i in range(2))
    others = drawn(2, width).features_PSD
    found = row_metrics(student, teacher, others, PROMPTS, world)
    absent = absent_metrics(teacher, PROMPTS, world)
    assert sorted([*found, *absent]) == sorted(NAMES)
    assert len(absent) == count and all(absent.values())


def test_a_teacher_is_not_compared_with_itself():
    teacher = drawn(0)
    found = row_metrics(teacher, teacher, drawn(2).features_PSD, PROMPTS, BOTH)
    assert set(found) == {
        *("adherence", "coverage", "distance_features", "distance_pixels"),
        *("frechet", "frechet_limit", "vendi", "vendi_corrected"),
        *("identity_features", "identity_pixels"),
    }


def test_adherence_and_coverage_by_hand():
    teacher = drawn(0)
    words = np.full((3, 5, 2), "", "U4")
    words[0, :4] = ["dot", "red"]
    words[1, :3] = [["dot", "red"], ["bar", "red"], ["bar", "blue"]]
    words[2, :2] = [["dot", "red"], ["bar", "blue"]]
    row = replace(drawn(1), words_PSA=words)
    found = row_metrics(row, teacher, None, PROMPTS, ORACLE)
    assert found["adherence"].value == pytest.approx((4 + 2 + 2) / 15)
    # Of ink: 1, 2 and 2 words; of the shape, which the third leaves open too: 2.
    assert found["coverage"].value == pytest.approx((1 + 2 + 2) / 3)
    same = row_metrics(replace(row), row, None, PROMPTS, ORACLE)
    assert same["coverage_ratio"] == (1, 1, 1)


def test_coverage_of_prompts_that_leave_nothing_open():
    closed = World(Oracle(("shape",), lambda images: None, parse))
    teacher = replace(drawn(0), words_PSA=np.full((3, 5, 1), "dot"))
    prompts = ["a dot"] * 3
    found = row_metrics(teacher, teacher, None, prompts, closed)
    assert found["adherence"].value == 1 and "coverage" not in found
    assert absent_metrics(teacher, prompts, closed)["coverage"] == (
        "no prompt leaves an attribute open"
    )


def test_coverage_with_a_teacher_that_draws_nothing():
    teacher = replace(drawn(0), words_PSA=np.full((3, 5, 2), ""))
    found = row_metrics(drawn(1), teacher, None, PROMPTS, ORACLE)
    assert found["coverage"].value > 0 and "coverage_ratio" not in found
    assert absent_metrics(teacher, PROMPTS, ORACLE)["coverage_ratio"] == (
        "the teacher draws no picture of the world"
    )


def test_seed_identity_of_perturbed_noises():
    row = drawn(0)
    near = row.images_PSHWC[:2] + 0.01
    kept = replace(row, near_QSHWC=near)
    lost = replace(row, near_QSHWC=np.roll(near, 1, axis=1))
    collapsed = replace(row, near_QSHWC=near[:, :1].repeat(5, axis=1))
    for changed, value in ((kept, 1), (lost, 0), (collapsed, 0.2)):
        found = row_metrics(changed, drawn(1), None, PROMPTS, World())
        assert found["identity_pixels"].value == pytest.approx(value)


def test_reason_for_an_absent_frechet_distance():
    assert absent_metrics(drawn(0, 15), PROMPTS, BOTH) == {
        "frechet": "15 pictures; takes more than the 15 features",
        "frechet_limit": "6 pictures of half the seeds; takes more than the 15 features",
    }
    assert list(absent_metrics(drawn(0, 6), PROMPTS, BOTH)) == ["frechet_limit"]


def test_a_teacher_that_draws_every_seed_alike():
    teacher, student = drawn(0), drawn(1)
    teacher.images_PSHWC[:] = teacher.images_PSHWC[:, :1]
    found = row_metrics(student, teacher, drawn(2).features_PSD, PROMPTS, BOTH)
    assert absent_metrics(teacher, PROMPTS, BOTH) == {
        "distance_pixels_ratio": "the teacher draws every seed alike"
    }
    assert "distance_pixels_ratio" not in found and "distance_features_ratio" in found
    assert all(np.isfinite([v for v in m if v is not None]).all() for m in found.values())


def test_tangents_are_averaged_within_a_prompt():
    teacher, student = drawn(0), drawn(0)
    student.tangents_TPHWC[0] *= 4.0
    student.tangents_TPHWC[1] *= -0.25
    found = row_metrics(student, teacher, None, PROMPTS, World())
    np.testing.assert_allclose(found["tangent_cosine"], 0, atol=1e-12)
    np.testing.assert_allclose(found["tangent_norm_ratio"], 1)
