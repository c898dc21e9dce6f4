"""Layout tasks: centres of shapes, and gradients of their distance to a target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.worlds import shapes
from gadjax.worlds.layout import CAPTIONS, POSITION_CENTRES, centre, squared_distance


@pytest.fixture(scope="module")
def world():
    images, _, scenes = shapes.sample_batch(5, range(300))
    return images, scenes


def soft(x, y, ink, background):
    """A round blob as a function of its place, differentiable unlike the renderer."""
    middles = jnp.arange(shapes.SIZE) + 0.5
    squared = (middles[None, :] - x) ** 2 + (middles[:, None] - y) ** 2
    mask = jnp.exp(-squared / 12)[:, :, None]
    return background + mask * (ink - background)


def test_captions_leave_the_layout_open_on_every_background():
    for caption in CAPTIONS:
        named = shapes.parse(caption)
        assert set(named) == {"ink", "shape"}
        for background in shapes.BACKGROUNDS:
            shapes.check_words({**named, "background": background}, caption)
    assert len(set(CAPTIONS)) == len(CAPTIONS)


def test_places_are_in_the_cells_of_their_words():
    assert set(POSITION_CENTRES) == set(shapes.POSITIONS)
    assert POSITION_CENTRES["top right"] == (23.75, 8.25) and POSITION_CENTRES["left"] == (
        8.25,
        16.0,
    )


def test_centres_of_rendered_images(world):
    images, scenes = world
    centres = np.asarray(jax.jit(jax.vmap(centre))(images))
    # A triangle's mass lies below the middle of its square: by a sixth of its height.
    expected = [[s.x, s.y + (s.radius / 3 if s.shape == "triangle" else 0)] for s in scenes]
    np.testing.assert_allclose(centres, expected, atol=0.2)


def test_faint_noise_hardly_moves_it(world):
    images, scenes = world
    chosen = [i for i, s in enumerate(scenes) if s.size == "large"][:100]
    noisy = images[chosen] + 0.03 * np.random.default_rng(0).standard_normal(images[chosen].shape)
    moved = jax.vmap(centre)(noisy) - jax.vmap(centre)(images[chosen])
    assert np.abs(np.asarray(moved)).max() < 1.0


@pytest.mark.parametrize("background", [0.96, 0.24, -0.94], ids=["white", "grey", "black"])
@pytest.mark.parametrize("place", ["top left", "right", "bottom"])
def test_its_gradient_points_to_the_place(background, place):
    """Chain rule: the gradient in (x, y) is 2 (centre - target), for any colours."""
    ink = jnp.array(shapes.INKS["red"]) * 2 - 1
    with jax.enable_x64(True):
        target = np.array(POSITION_CENTRES[place])

        def off(xy):
            return squared_distance(soft(*xy, ink, background * jnp.ones(3)), jnp.array(target))

        here = np.array([16.0, 14.0])
        slope = jax.grad(off)(jnp.array(here))
    np.testing.assert_allclose(slope, 2 * (here - target), rtol=2e-2, atol=0.1)


def test_an_empty_picture_has_no_slope():
    value, slope = jax.value_and_grad(squared_distance)(jnp.zeros((32, 32, 3)), jnp.ones(2))
    assert np.isfinite(value)
    np.testing.assert_array_equal(slope, 0)
