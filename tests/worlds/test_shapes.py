"""Shapes world: rendering, captions and their parser, determinism."""

import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.worlds import shapes
from gadjax.worlds.shapes import ATTRIBUTES, Scene


def place(scene):
    return scene.x, scene.y, scene.radius


def test_pictures_are_float32_and_in_range():
    images, _, scenes = shapes.sample_batch(0, range(256))
    assert images.shape == (256, 32, 32, 3) and images.dtype == np.float32
    assert images.min() >= -1 and images.max() <= 1
    for image, scene in zip(images, scenes, strict=True):
        background = np.array(shapes.BACKGROUNDS[scene.background]) * 2 - 1
        # The largest shapes reach into the outermost pixels, but never cover them.
        ring = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        ink = np.array(shapes.INKS[scene.ink]) * 2 - 1
        share = (ring - background) @ (ink - background) / ((ink - background) ** 2).sum()
        assert share.max() < 0.5
        if scene.size == "small":
            np.testing.assert_allclose(ring, np.broadcast_to(background, ring.shape), atol=1e-6)
        if scene.shape != "square":
            np.testing.assert_allclose(corners, np.broadcast_to(background, (4, 3)), atol=1e-6)


@pytest.mark.parametrize("radius", [2.8, 4.1, 6.4])
@pytest.mark.parametrize(
    "shape, area",
    # In units of the squared radius.
    [("circle", np.pi), ("square", 4.0), ("triangle", 2.0), ("cross", 4 * 0.36 * (2 - 0.36))],
)
def test_coverage_has_the_area_and_centre_of_the_shape(shape, area, radius):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(12, 20, (2, 200))
    masks = shapes.coverage(shape, x, y, np.full(200, radius))
    np.testing.assert_allclose(masks.sum((1, 2)).mean(), area * radius**2, rtol=0.03)
    middles = np.arange(32) + 0.5
    total = masks.sum((1, 2))
    np.testing.assert_allclose((masks.sum(1) * middles).sum(1) / total, x, atol=0.1)
    # The centroid of the triangle lies a sixth of its height below the middle of that height.
    drop = radius / 3 if shape == "triangle" else 0
    np.testing.assert_allclose((masks.sum(2) * middles).sum(1) / total, y + drop, atol=0.15)


def test_shapes_move_continuously():
    base = {"shape": "circle", "ink": "red", "background": "white", "position": "centre"}
    still = shapes.render(Scene(**base, size="small", x=16, y=16, radius=3))
    moved = shapes.render(Scene(**base, size="small", x=16.01, y=16, radius=3))
    assert 0 < np.abs(still - moved).max() < 0.03


def test_triangle_points_up_and_y_runs_down():
    triangle = Scene("triangle", "black", "white", "top", "large", 16.0, 8.0, 6.0)
    ink = shapes.render(triangle)[:, :, 0] < 0
    assert ink[:16].any() and not ink[16:].any()
    assert ink[4].sum() < ink[12].sum()


def test_sampled_words_match_sampled_numbers():
    rng = np.random.default_rng(3)
    for scene in (shapes.sample_scene(rng) for _ in range(500)):
        column, row = shapes.POSITIONS[scene.position]
        spans = (shapes.CELLS[column], shapes.CELLS[row], shapes.SIZES[scene.size])
        for value, (low, high) in zip(place(scene), spans, strict=True):
            assert low <= value <= high
        assert (scene.ink, scene.background) in shapes.CONTRASTING
        assert scene.radius < min(scene.x, scene.y, 32 - scene.x, 32 - scene.y)


def test_every_word_is_drawn():
    _, _, scenes = shapes.sample_batch(1, range(400))
    for attribute, words in ATTRIBUTES.items():
        assert {getattr(scene, attribute) for scene in scenes} == set(words)


def test_fixed_words_are_kept_and_leave_the_rest_random():
    rng = np.random.default_rng(0)
    drawn = [shapes.sample_scene(rng, ink="white", position="left") for _ in range(60)]
    assert {(s.ink, s.position) for s in drawn} == {("white", "left")}
    assert {s.background for s in drawn} == {"grey", "black"}
    assert {s.shape for s in drawn} == set(shapes.SHAPES)


@pytest.mark.parametrize(
    "fixed, message",
    [
        ({"ink": "orange"}, "orange"),
        ({"colour": "red"}, "colour"),
        ({"ink": "black", "background": "black"}, "black on black"),
    ],
)
def test_impossible_words_are_refused(fixed, message):
    with pytest.raises(InputError, match=message):
        shapes.sample_scene(np.random.default_rng(0), **fixed)


def test_captions_by_example():
    scene = Scene("square", "blue", "grey", "top left", "large", 8.0, 8.0, 6.0)
    full = "a large blue square at the top left on a grey background"
    assert shapes.caption(scene, tuple(ATTRIBUTES)) == full
    assert shapes.caption(scene, ()) == "a shape"
    assert shapes.caption(scene, ("background", "ink")) == "a blue shape on a grey background"
    assert shapes.caption(scene, ("shape", "size", "position")) == "a large square at the top left"
    with pytest.raises(InputError, match="colour"):
        shapes.caption(scene, ("colour",))


def test_parse_inverts_caption():
    rng = np.random.default_rng(5)
    for _ in range(500):
        scene, mentioned = shapes.sample_scene(rng), shapes.sample_mentioned(rng)
        expected = {attribute: getattr(scene, attribute) for attribute in mentioned}
        assert shapes.parse(shapes.caption(scene, mentioned)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a large dog",
        "red circle",
        "a red large circle",
        "a circle at the top left on a grey background.",
        "a circle at the middle",
        "a circle  at the top",
        "A circle",
        "a circle\n",
        "a white circle on a white background",
    ],
)
def test_parse_refuses_other_text(text):
    with pytest.raises(InputError, match="caption"):
        shapes.parse(text)


def test_mentions_range_from_none_to_all():
    rng = np.random.default_rng(0)
    counts = np.bincount([len(shapes.sample_mentioned(rng)) for _ in range(4000)], minlength=6)
    assert (counts > 0).all()
    # 0.3 on purpose and 0.7 / 2**5 by chance.
    assert abs(counts[5] / 4000 - 0.322) < 0.03


def test_vocabulary_covers_captions_and_nothing_else():
    _, captions, _ = shapes.sample_batch(2, range(600))
    assert {word for text in captions for word in text.split()} == set(shapes.vocabulary())


def test_batches_agree_with_single_samples():
    indices = [0, 7, 3, 123456789, 7]
    images, captions, scenes = shapes.sample_batch(11, indices)
    for i, index in enumerate(indices):
        image, text, scene = shapes.sample(11, index)
        np.testing.assert_array_equal(images[i], image)
        assert (captions[i], scenes[i]) == (text, scene)
    np.testing.assert_array_equal(shapes.render_batch(scenes), images)
    assert shapes.sample(11, 0)[2] != shapes.sample(12, 0)[2]
    assert shapes.render_batch([]).shape == (0, 32, 32, 3)


def test_full_prompts_name_everything_and_do_not_repeat():
    total = 4 * len(shapes.CONTRASTING) * 9 * 2
    prompts = shapes.full_prompts(total + 10, 0)
    assert all(len(shapes.parse(text)) == len(ATTRIBUTES) for text in prompts)
    assert len(set(prompts[:total])) == total
    assert prompts[total:] == prompts[:10]
    assert shapes.full_prompts(20, 0) == prompts[:20] != shapes.full_prompts(20, 1)


def test_partial_prompts_leave_an_attribute_open():
    prompts = shapes.partial_prompts(300, 0)
    named = {len(shapes.parse(text)) for text in prompts}
    assert len(prompts) == 300 and named == set(range(len(ATTRIBUTES)))
    assert shapes.partial_prompts(20, 0) == prompts[:20] != shapes.partial_prompts(20, 1)
