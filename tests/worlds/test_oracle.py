"""The oracle is exact on the world's own pictures and turns everything else away."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.worlds import shapes
from gadjax.worlds.oracle import MAX_RESIDUAL, adherence, adheres, judge
from gadjax.worlds.oracle import words as described
from gadjax.worlds.shapes import ATTRIBUTES, BACKGROUNDS, CELLS, INKS, SIZES, Scene


def words(scene):
    return {attribute: getattr(scene, attribute) for attribute in ATTRIBUTES}


def passes(verdicts):
    return np.array([adheres(verdict, {}) for verdict in verdicts])


def blur(images, sigma):
    """Gaussian blur of [N, H, W, C] with the border repeated."""
    reach = int(4 * sigma) + 1
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (1, 2):
        pads = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        padded = np.pad(images, pads, mode="edge")
        size = images.shape[axis]
        images = sum(t * np.take(padded, range(i, i + size), axis) for i, t in enumerate(taps))
    return images


@pytest.fixture(scope="module")
def world():
    images, _, scenes = shapes.sample_batch(3, range(600))
    return images, scenes


def test_exact_on_clean_renders(world):
    images, scenes = world
    verdicts = judge(images)
    for verdict, scene in zip(verdicts, scenes, strict=True):
        assert verdict.words == words(scene)
        fitted = np.array([verdict.x, verdict.y, verdict.radius])
        np.testing.assert_allclose(fitted, [scene.x, scene.y, scene.radius], atol=0.02)
        ink, background = np.array([INKS[scene.ink], BACKGROUNDS[scene.background]]) * 2 - 1
        np.testing.assert_allclose(verdict.ink_rgb, ink, atol=0.02)
        np.testing.assert_allclose(verdict.background_rgb, background, atol=0.02)
        assert verdict.residual < 0.02 and verdict.fitted_residual < 0.02
        best, second = sorted(verdict.shape_errors)[:2]
        assert best < 0.01 < second


def test_exact_on_every_combination_of_words():
    captions = shapes.full_prompts(1368, 0)
    rng = np.random.default_rng(0)
    scenes = [shapes.sample_scene(rng, **shapes.parse(text)) for text in captions]
    assert adherence(shapes.render_batch(scenes), captions).all()


def test_words_of_pictures_that_are_the_world_s_and_of_others(world):
    images, scenes = world
    rows = described(np.concatenate([images[:5], 0 * images[:2]]))
    assert rows[:5].tolist() == [list(words(scene).values()) for scene in scenes[:5]]
    assert rows[5:].tolist() == [[""] * len(ATTRIBUTES)] * 2
    assert described(images[:0]).shape == (0, len(ATTRIBUTES))


def test_exact_with_slight_blur_and_noise(world):
    images, scenes = world
    rng = np.random.default_rng(0)
    verdicts = judge(blur(images, 0.5) + 0.05 * rng.standard_normal(images.shape))
    assert all(adheres(v, words(s)) for v, s in zip(verdicts, scenes, strict=True))
    assert max(v.residual for v in verdicts) < 0.95 * MAX_RESIDUAL
    for name in ("x", "y", "radius"):
        off = [getattr(v, name) - getattr(s, name) for v, s in zip(verdicts, scenes, strict=True)]
        assert np.abs(off).max() < 0.3


def test_exact_at_the_ends_of_every_range():
    scenes = []
    for shape, (position, (column, row)), size in product(
        shapes.SHAPES, shapes.POSITIONS.items(), SIZES
    ):
        for x, y, radius in product(CELLS[column], CELLS[row], SIZES[size]):
            scenes.append(Scene(shape, "blue", "grey", position, size, x, y, radius))
    rng = np.random.default_rng(0)
    images = shapes.render_batch(scenes)
    verdicts = judge(images + 0.05 * rng.standard_normal(images.shape))
    assert all(adheres(v, words(s)) for v, s in zip(verdicts, scenes, strict=True))


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_words_change_midway_between_ranges(shape):
    scene = Scene(shape, "red", "white", "centre", "large", 16.0, 16.0, 5.5)
    step = 0.05
    border = (CELLS[0][1] + CELLS[1][0]) / 2
    size_border = (SIZES["small"][1] + SIZES["large"][0]) / 2
    near = [
        replace(scene, x=border - step, position="left"),
        replace(scene, x=border + step),
        replace(scene, y=border - step, position="top"),
        replace(scene, x=32 - border + step, y=32 - border + step, position="bottom right"),
        replace(scene, radius=size_border - step, size="small"),
        replace(scene, radius=size_border + step),
    ]
    assert [v.words for v in judge(shapes.render_batch(near))] == [words(s) for s in near]


def test_wrong_words_do_not_adhere(world):
    images, scenes = world
    for verdict, scene in zip(judge(images[:100]), scenes[:100], strict=True):
        assert adheres(verdict, {}) and adheres(verdict, {"shape": scene.shape})
        for attribute, options in ATTRIBUTES.items():
            for other in set(options) - {getattr(scene, attribute)}:
                assert not adheres(verdict, {attribute: other})


def test_a_circle_is_no_square_however_it_is_perturbed():
    rng = np.random.default_rng(0)
    scenes = [shapes.sample_scene(rng, shape="circle") for _ in range(200)]
    images = blur(shapes.render_batch(scenes), 0.5)
    images += 0.05 * rng.standard_normal(images.shape)
    assert not adherence(images, ["a square"] * 200).any()
    assert adherence(images, ["a circle"] * 200).all()


def test_two_shapes_are_refused():
    opposite = {"left": "right", "top": "bottom", "top left": "bottom right"}
    rng = np.random.default_rng(0)
    images = []
    for here, there in list(opposite.items()) * 50:
        first = shapes.sample_scene(rng, position=here)
        second = shapes.sample_scene(rng, position=there, background=first.background)
        mask = shapes.coverage(second.shape, second.x, second.y, second.radius)[0, :, :, None]
        ink = np.array(INKS[second.ink]) * 2 - 1
        images.append(shapes.render(first) * (1 - mask) + mask * ink)
    assert not passes(judge(np.stack(images))).any()


@pytest.mark.parametrize("size, sigma", [("small", 1.5), ("small", 2.5), ("large", 2.5)])
def test_blobs_are_refused(size, sigma):
    rng = np.random.default_rng(0)
    scenes = [shapes.sample_scene(rng, shape="square", size=size) for _ in range(100)]
    assert not passes(judge(blur(shapes.render_batch(scenes), sigma))).any()


def test_strange_colours_are_refused():
    rng = np.random.default_rng(0)
    strange = np.array([(1, 0.5, 0), (1, 0.6, 0.7), (0.1, 0.8, 0.9), (0.5, 0.9, 0.1)]) * 2 - 1
    images = []
    for ink in np.repeat(strange, 40, axis=0):
        scene = shapes.sample_scene(rng)
        mask = shapes.coverage(scene.shape, scene.x, scene.y, scene.radius)[0, :, :, None]
        background = np.array(BACKGROUNDS[scene.background]) * 2 - 1
        images.append(background + mask * (ink - background))
    verdicts = judge(np.stack(images))
    assert not passes(verdicts).any()
    # The form is right, and the fitted residual says so.
    assert max(verdict.fitted_residual for verdict in verdicts) < 0.05


def test_pictures_without_a_shape_are_refused():
    rng = np.random.default_rng(0)
    flat = np.repeat(np.array(list(BACKGROUNDS.values()))[:, None, None, :] * 2 - 1, 20, axis=0)
    empty = np.broadcast_to(flat, (60, 32, 32, 3))
    noise = rng.uniform(-1, 1, (60, 32, 32, 3))
    for images in (
        empty,
        empty + 0.05 * rng.standard_normal(empty.shape),
        np.zeros((1, 32, 32, 3)),
        noise,
        blur(noise * 4, 1.5).clip(-1, 1),
    ):
        verdicts = judge(images)
        assert not passes(verdicts).any()
        assert np.isfinite([verdict.residual for verdict in verdicts]).all()


def test_verdicts_do_not_depend_on_the_batch(world):
    images, _ = world
    together = judge(images[:300])
    for i in (0, 150, 299):
        alone = judge(images[i : i + 1])[0]
        assert alone.words == together[i].words
        np.testing.assert_allclose(alone.x, together[i].x, atol=1e-3)
    assert judge(images[:0]) == []


def test_bad_input_is_refused(world):
    images, scenes = world
    with pytest.raises(InputError, match="images"):
        judge(images[0])
    with pytest.raises(InputError, match="finite"):
        judge(np.full((1, 32, 32, 3), np.nan))
    with pytest.raises(InputError, match="captions: found 1"):
        adherence(images[:2], ["a shape"])
    with pytest.raises(InputError, match="caption"):
        adherence(images[:1], ["a dog"])
    with pytest.raises(InputError, match="orange"):
        adheres(judge(images[:1])[0], {"ink": "orange"})
