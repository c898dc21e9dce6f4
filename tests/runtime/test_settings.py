"""Results that do not depend on JAX's configuration, from the environment or a program."""

from contextlib import contextmanager

import jax
import numpy as np
import pytest

import gadjax
from gadjax.errors import InputError
from gadjax.pipelines.sampling import initial_noise
from gadjax.seeds import make_key

# Options that would change the noise of a seed, or raise for what is intended here.
OTHERS = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_transfer_guard": "disallow",
}


@contextmanager
def configured(**settings):
    """Set options for all threads, as environment variables do."""
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_noise_depends_on_the_seed_only():
    # The values under JAX's default settings.
    expected = [0.415283, -1.379870]
    for name, value in [("jax_enable_x64", False), *OTHERS.items()]:
        with configured(**{name: value}):
            actual = initial_noise(5, 2, (2, 2, 1))
            assert actual.dtype == np.float32 and actual.shape == (2, 2, 2, 1)
            np.testing.assert_allclose(actual[:, 0, 0, 0], expected, atol=1e-6)


def distilled(teacher):
    """A student after one update, with noise of every kind, and its samples."""
    prompts = ["red circle", "green square"]
    objective = gadjax.objectives.GAD(steps=1) + gadjax.objectives.Anchor(steps=1)
    changes = {"batch": 2, "remat": "none", "data": {"length": 8}, "guidance": 3, "seed": 3}
    student = gadjax.distill(teacher, objective, prompts, steps=2, updates=1, **changes)
    images = gadjax.sample(student, prompts, seed=2)
    return images, jax.device_get(student.trained.params)


@pytest.mark.slow
def test_student_and_images_depend_on_seeds_only(tiny_pipeline):
    images, params = distilled(tiny_pipeline)
    with configured(**OTHERS):
        actual, others = distilled(tiny_pipeline)
    np.testing.assert_array_equal(actual, images)
    jax.tree.map(np.testing.assert_array_equal, others, params)


def test_disabled_jit_is_refused(tiny_pipeline):
    model = gadjax.load(tiny_pipeline)
    with configured(jax_disable_jit=True):
        for call in (distilled, gadjax.load, lambda _: gadjax.sample(model, ["red circle"])):
            with pytest.raises(InputError, match="JAX_DISABLE_JIT: found"):
                call(tiny_pipeline)


def test_all_bits_of_a_seed_count():
    for seed in (0, 7, 2**32 - 1):
        known = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
        np.testing.assert_array_equal(jax.random.key_data(make_key(seed)), known)
    seeds = (7, 2**32 + 7, 2**63 + 7, 2**64 - 1)
    drawn = [initial_noise(seed, 1, (2, 2, 1)) for seed in seeds]
    assert len({x.tobytes() for x in drawn}) == len(seeds)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_of_more_bits_is_refused(seed):
    line = f"seed: found {seed}; expected 0 to 2.64 - 1"
    with pytest.raises(InputError, match=line):
        make_key(seed)
    with pytest.raises(InputError, match=line):
        gadjax.distill("asset:shapes_teacher", {"regression": {}}, ["a"], seed=seed)
