"""Noise-control tasks and their metrics, on pictures without a network."""

from dataclasses import replace

import numpy as np
import pytest

from gadjax.evaluation.metric_catalogue import catalogue
from gadjax.evaluation.noise_control import (
    POINTS,
    ControlResults,
    LayoutResult,
    LayoutTargets,
    choose_targets,
    classify_library,
    make_library,
)
from gadjax.evaluation.noise_control_metrics import absent_control, control_metrics
from gadjax.evaluation.oracles import WORLDS, Layout, Oracle, World

CAPTIONS = ("a dot", "a bar", "a dot above")
SHAPES, PLACES = ("dot", "bar"), ("above", "below", "beside")


def parse(caption):
    words = caption.split()[1:]
    return dict(zip(("shape", "place"), words, strict=False))


def classify(images_NHWC):
    """The first two numbers of a picture index its words; below zero it is none of the world's."""
    numbers = images_NHWC.reshape(len(images_NHWC), -1)[:, :2].astype(int)
    words = [[SHAPES[s], PLACES[p]] if s >= 0 else ["", ""] for s, p in numbers]
    return np.array(words)


WORLD = World(
    Oracle(("shape", "place"), classify, parse),
    lambda images: images.reshape(len(images), -1)[:, :2],
    None,
    CAPTIONS,
    Layout("place", dict.fromkeys(PLACES, (0.0, 0.0)), lambda image, place: 0.0),
)
NOISES = 12


@pytest.fixture(scope="module")
def library():
    return make_library(WORLD, NOISES, (4, 4, 2))


def drawn(library, seed):
    """Random pictures in the form in which a model returns them."""
    rng, images = np.random.default_rng(seed), {}
    for name, (prompts, _) in library.sets().items():
        images[name] = rng.standard_normal((len(prompts), 2, 2, 3))
        images[name][:, 0, 0, 0] = rng.integers(-1, 2, len(prompts))
        images[name][:, 0, 0, 1] = rng.integers(0, 3, len(prompts))
    return images


def test_prompts_and_noises_of_the_sets(library):
    sets = library.sets()
    prompts, noise = sets["library"]
    assert prompts[:NOISES] == ["a dot"] * NOISES and len(prompts) == len(noise) == 3 * NOISES
    np.testing.assert_array_equal(noise[:NOISES], noise[NOISES : 2 * NOISES])
    prompts, noise = sets["paths"]
    assert len(prompts) == len(noise) == 6 * (POINTS - 2)
    assert prompts[:: POINTS - 2] == [*CAPTIONS, *CAPTIONS]
    norms = np.linalg.norm(library.noise_LHWC.reshape(NOISES, -1), axis=1)
    first = np.linalg.norm(noise[: POINTS - 2].reshape(POINTS - 2, -1), axis=1)
    assert np.all((first >= norms[:2].min()) & (first <= norms[:2].max()))


def test_paths_begin_and_end_in_the_library(library):
    images = drawn(library, 0)
    found = classify_library(library, images)
    assert found.paths_MKHWC.shape == (6, POINTS, 2, 2, 3)
    for m, (c, a, b) in enumerate(library.paths):
        assert (c, a, b) == (m % 3, 2 * m, 2 * m + 1)
        np.testing.assert_array_equal(found.paths_MKHWC[m, 0], images["library"][c * NOISES + a])
        np.testing.assert_array_equal(found.paths_MKHWC[m, -1], images["library"][c * NOISES + b])
    between = images["paths"].reshape(6, POINTS - 2, 2, 2, 3)
    np.testing.assert_array_equal(found.paths_MKHWC[:, 1:-1], between)
    flat = found.paths_MKHWC.reshape(-1, 2, 2, 3)
    np.testing.assert_array_equal(found.path_words_MKA.reshape(-1, 2), classify(flat))


def test_targets_start_from_adhering_pictures_and_lead_elsewhere(library):
    teacher = classify_library(library, drawn(library, 0))
    targets = choose_targets(library, teacher.words_CLA, 10)
    assert len(targets.captions) == 10
    for n, (c, place) in enumerate(zip(targets.captions, targets.places, strict=True)):
        assert teacher.words_CLA[c, n, 1] != place
        fits = WORLD.oracle.adheres(teacher.words_CLA[:, n], CAPTIONS)
        assert fits[c] or not fits.any()
        if fits[n % 3]:
            assert c == n % 3
    assert len(choose_targets(library, teacher.words_CLA, 99).places) == NOISES


def row(library, seed, reached):
    found = classify_library(library, drawn(library, seed))
    hits = np.array(reached, bool)
    return replace(
        found, layout_result=LayoutResult(np.zeros((4, 3, 2, 2, 3)), hits, np.array([0.0, 30, 60]))
    )


@pytest.fixture(scope="module")
def control(library):
    targets = LayoutTargets(np.zeros(3, int), ("above",) * 3)
    early, late = [[0, 0, 0]] * 3, [[1, 1, 0]]
    rows = {
        "teacher": row(library, 0, early + late),
        "student": row(library, 1, [[1, 0, 0]] * 4),
        "same": row(library, 0, early + late),
    }
    return ControlResults(library, targets, rows)


def test_every_metric_is_taken(control):
    for key in ("student", "same"):
        found = control_metrics(control, key)
        names = [n for n, m in catalogue(WORLD).items() if m.group in ("retrieval", "control")]
        assert set(names) <= set(found) <= set(catalogue(WORLD))
        assert all(m.low <= m.value <= m.high for m in found.values())
        assert absent_control(control, set(found), WORLD) == {}


def test_a_student_that_is_its_teacher(control):
    found, teacher = (control_metrics(control, key) for key in ("same", "teacher"))
    for name, metric in found.items():
        compared = name.startswith("retrieval") and "chance" not in name
        if compared or name == "path_agreement" or name.endswith("_ratio"):
            assert metric == (1, 1, 1) and name not in teacher
        else:
            assert metric == teacher[name]
    assert teacher["retrieval_place_chance"].value < 0.6


def test_layout_control_and_path_agreement_of_another_student(control):
    found = control_metrics(control, "student")
    assert found["control"].value == found["control_0"].value == pytest.approx(1 / 3)
    assert control_metrics(control, "teacher")["control_0"] == (0, 0, 0)
    assert found["control_angle"].value == pytest.approx(30)
    # Places alone are open, and on the third caption's paths not even these.
    hits = asked = 0
    student, teacher = control.rows["student"], control.rows["teacher"]
    for m, (c, _, _) in enumerate(control.library.paths):
        for k in range(POINTS if c != 2 else 0):
            asked += teacher.path_words_MKA[m, k, 1] != ""
            named = teacher.path_words_MKA[m, k, 1] != ""
            hits += named and student.path_words_MKA[m, k, 1] == teacher.path_words_MKA[m, k, 1]
    assert found["path_agreement"].value == pytest.approx(hits / asked)
    assert "retrieval_shape" not in found


@pytest.mark.parametrize(
    ("world", "reason"),
    [
        (World(), "no oracle"),
        (World(WORLD.oracle), "the world has no captions for it"),
        (WORLD, "no library asked for"),
    ],
)
def test_reasons_for_absent_metrics(world, reason):
    absent = absent_control(None, set(), world)
    assert set(absent.values()) == {reason}
    assert {"retrieval", "control", "control_2", "path_jump_pixels"} <= set(absent)


def test_reasons_for_absent_layout_metrics(library):
    no_targets = ControlResults(
        library, None, {"teacher": classify_library(library, drawn(library, 0))}
    )
    taken = set(control_metrics(no_targets, "teacher"))
    absent = absent_control(no_targets, taken, WORLD)
    assert absent["control"] == "no moves asked for" and "path_jump_pixels" not in absent
    reduced = replace(WORLD, layout=None, extractor=None)
    absent = absent_control(no_targets, set(), reduced)
    assert absent["control"] == "the world has no places"
    assert absent["path_jump_features"] == "no feature extractor"


def test_a_teacher_that_draws_nothing_of_the_world(library):
    images = drawn(library, 0)
    for part in images.values():
        part[:, 0, 0, 0] = -1
    nothing = classify_library(library, images)
    assert len(choose_targets(library, nothing.words_CLA, 4).places) == 4
    control = ControlResults(library, None, {"teacher": nothing, "student": replace(nothing)})
    found = control_metrics(control, "student")
    absent = absent_control(control, set(found), WORLD)
    assert (
        absent["retrieval"]
        == absent["path_agreement"]
        == ("the teacher draws nothing to compare with")
    )
    assert all(np.isfinite([v for v in m if v is not None]).all() for m in found.values())


def test_the_shapes_world():
    world = WORLDS["shapes"]
    names = [n for n in catalogue(world) if n.startswith("retrieval_")]
    assert [n for n in names if not n.endswith("chance")] == [
        "retrieval_size",
        "retrieval_position",
        "retrieval_background",
    ]
    for place in world.layout.places:
        assert world.oracle.parse(f"a circle at the {place}")[world.layout.attribute] == place
