"""Which numbers are taken, and which are reported as absent."""

import numpy as np
import pytest

from gadjax.evaluation.metrics import METRICS, Drawn, absent_metrics, row_metrics
from gadjax.evaluation.worlds import World

PROMPTS = ["one", "two", "three"]
ORACLE = World(oracle=lambda images, captions: np.array([c == "two" for c in captions]))
BOTH = World(ORACLE.oracle, lambda images: None)


def drawn(seed, width=4, tangents=2):
    rng = np.random.default_rng(seed)
    return Drawn(
        rng.uniform(-1, 1, (3, 5, 8, 8, 3)),
        rng.standard_normal((3, 5, width)) if width else None,
        rng.standard_normal((tangents, 3, 4, 4, 2)) if tangents else None,
    )


@pytest.mark.parametrize(
    ("world", "width", "tangents", "count"),
    [(BOTH, 4, 2, 0), (BOTH, 4, 0, 2), (BOTH, 15, 2, 1), (ORACLE, 0, 2, 6), (World(), 0, 0, 9)],
)
def test_every_metric_is_taken_or_absent_for_a_reason(world, width, tangents, count):
    teacher, student = drawn(0, width, tangents), drawn(1, width, tangents)
    others = drawn(2, width).features_PSD
    found = row_metrics(student, teacher, others, PROMPTS, world)
    absent = absent_metrics(teacher, world)
    assert sorted([*found, *absent]) == sorted(METRICS)
    assert len(absent) == count and all(absent.values())


def test_a_teacher_is_not_compared_with_itself():
    teacher = drawn(0)
    found = row_metrics(teacher, teacher, drawn(2).features_PSD, PROMPTS, BOTH)
    assert list(found) == ["adherence", "frechet", "vendi", "distance_features", "distance_pixels"]
    assert found["adherence"].value == pytest.approx(1 / 3)


def test_why_there_is_no_distance():
    assert absent_metrics(drawn(0, 15), BOTH) == {
        "frechet": "15 pictures; takes more than the 15 features"
    }


def test_a_teacher_that_draws_every_seed_alike():
    teacher, student = drawn(0), drawn(1)
    teacher.images_PSHWC[:] = teacher.images_PSHWC[:, :1]
    found = row_metrics(student, teacher, drawn(2).features_PSD, PROMPTS, BOTH)
    assert absent_metrics(teacher, BOTH) == {
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
