import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    FLOW_WORLD,
    SHAPE,
    D,
    gaussian_params,
    later_steps,
    law,
    make_batch,
    one_step,
)
from formula_terms import SAMPLES, compare, pictures

from gadjax.errors import InputError
from gadjax.objectives import Anchor, Embedding
from gadjax.objectives.embedding import LAYERS, embed, random_network, unbiased_mmd
from gadjax.training.checks import validate
from gadjax.training.config import default_config

sg = jax.lax.stop_gradient
SMALL = {"networks": 2, "width": 5}


def by_hand(params, x):
    """Features of 2 x 2 latents: the first layer sees all of them, the later ones a position."""
    first, *later = params
    x = jnp.einsum("bijc,ijcd->bd", x, first["kernel"][:2, :2]) + first["bias"]
    x = jnp.where(x > 0, x, 0)
    for layer in later:
        x = x @ layer["kernel"][1, 1] + layer["bias"]
        x = jnp.where(x > 0, x, 0)
    return x


def mmd(x, y):
    """Sums over all pairs, less those of a sample with itself."""

    def kernel(a, b):
        return jnp.einsum("in,jn->ij", a, b) / a.shape[1]

    def others(a):
        return (kernel(a, a).sum(1) - (a * a).sum(1) / a.shape[1]) / (len(a) - 1)

    return others(x) + others(y) - 2 * kernel(x, y).mean(1)


def loss(hand):
    x0, y0 = hand.x0(), hand.batch.x0
    keys = jax.random.split(hand.context.batch_key("networks"), 2)
    total = 0
    for key in keys:
        params = random_network(key, SHAPE[-1], 5, x0.dtype)
        assert [p["kernel"].shape for p in params] == [(3, 3, 2, 5)] + [(3, 3, 5, 5)] * (LAYERS - 1)
        total = total + 0.5 * mmd(by_hand(params, x0), sg(by_hand(params, y0)))
    return total


def test_the_loss_and_its_gradient_are_those_of_the_formula():
    compare(FLOW_WORLD, Embedding(**SMALL), loss, x0=pictures(float))


def test_random_networks_have_variances_of_order_one():
    x = np.random.default_rng(0).normal(size=(256, 16, 16, 4)).astype(np.float32)
    params = random_network(jax.random.key(0), 4, 32, jnp.float32)
    features = np.asarray(embed(params, x))
    assert features.shape == (256, 2 * 2 * 32)
    assert 0.5 < (features**2).sum(1).mean() < 10


def test_its_expectation_is_zero_where_the_distributions_agree_and_falls_towards_the_data():
    """A student's bias, with data of its own distribution and with data further off."""
    world, samples, repeats = one_step(FLOW_WORLD), 16, 256
    student, term = world.student_params(), Embedding(**SMALL)
    gaussian = law(student["step0"]["matrix"], student["step0"]["bias"])
    towards = np.linspace(-1, 1, D, dtype=np.float32)
    batch = make_batch(samples * repeats, text_scale=0.0)
    root = gaussian["basis"] * jnp.sqrt(jnp.maximum(gaussian["variance"], 0))
    draws = np.random.default_rng(7).normal(size=(samples * repeats, D)).astype(np.float32)
    data = gaussian["mean"] + draws @ root.T
    parts = jax.tree.map(lambda v: v.reshape(repeats, samples, *v.shape[1:]), batch)

    @jax.jit
    def run(student, data):
        pictures = data.reshape(repeats, samples, *SHAPE)

        def one(part):
            def loss(student):
                given = part[0]._replace(x0=part[1])
                return term(world.context(term, given, student))[0].mean()

            return jax.value_and_grad(loss)(student)

        return jax.lax.map(one, (parts, pictures))

    value, slope = jax.device_get(run(student, data))
    slope = slope["step0"]["bias"].astype(float)
    error = slope.std(0) / repeats**0.5
    assert abs(value.mean()) < 4 * value.std() / repeats**0.5
    assert np.all(np.abs(slope.mean(0)) < 4 * error)
    _, moved = jax.device_get(run(student, data + towards))
    moved = -moved["step0"]["bias"].mean(0)
    assert moved @ towards > 0.5 * np.linalg.norm(moved) * np.linalg.norm(towards)


def test_an_anchors_samples_are_in_no_pair():
    x, y = (np.random.default_rng(i).normal(size=(8, 6)).astype(np.float32) for i in (0, 1))
    weight = later_steps(8).astype(np.float32)
    slope = jax.grad(lambda x: (unbiased_mmd(x, y, weight) * weight).mean())(x)
    keep = weight > 0
    assert not np.any(slope[~keep]) and np.all(np.any(slope[keep], axis=1))
    actual = unbiased_mmd(x, y, weight)[keep]
    kernel = x @ x.T
    same = [np.mean([kernel[i, j] for j in np.flatnonzero(keep) if j != i]) for i in range(8)]
    cross = 2 * (x @ y.T).mean(1)
    data = ((y @ y.T).sum(1) - (y * y).sum(1)) / 7
    np.testing.assert_allclose(actual, (np.array(same) - cross + data)[keep], rtol=1e-4, atol=1e-5)


def test_beside_an_anchor_it_leaves_the_first_step_alone():
    term, batch = 1.0 * Embedding(**SMALL), make_batch(SAMPLES)._replace(x0=pictures())

    @jax.jit
    @jax.grad
    def slopes(student):
        nets = student, None, gaussian_params()
        return term(FLOW_WORLD.context(term + Anchor(), batch, *nets))[0].mean()

    first, *later = jax.device_get(slopes(FLOW_WORLD.student_params(bend=0.2))).values()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(first))
    assert all(np.any(step["matrix"]) for step in later)


def test_pictures_of_the_teacher():
    """The ends of its map from the batch's noise take the data's place; no picture is needed."""
    term, batch = Embedding("teacher", steps=3, **SMALL), make_batch(SAMPLES)
    assert not term.needs.images and term.needs.maps == (term.map,)
    nets = FLOW_WORLD.student_params(), None, gaussian_params()

    @jax.jit
    def run():
        context = FLOW_WORLD.context(term, batch, *nets)
        data = FLOW_WORLD.context(
            Embedding(**SMALL), batch._replace(x0=context.maps[term.map][0]), *nets
        )
        return term(context)[0], Embedding(**SMALL)(data)[0]

    np.testing.assert_allclose(*run(), rtol=1e-5, atol=1e-6)


def test_refusals():
    with pytest.raises(InputError, match="objective.embedding.source: found 'web'; expected one"):
        Embedding("web")
    for name in ("networks", "width", "steps"):
        with pytest.raises(InputError, match=f"objective.embedding.{name}: found 0; expected 1 or"):
            Embedding(**{name: 0})
    config = default_config()
    config.objective = {"embedding": {}, "regression": {}}
    config.teacher, config.batch, config.microbatch = "asset:shapes_flow_teacher", 8, 4
    config.data.world = "gadjax.worlds.shapes"
    with pytest.raises(InputError, match="microbatch: found 4; expected 0 or the batch's 8"):
        validate(config)
    config.batch, config.microbatch = 1, 0
    with pytest.raises(InputError, match="batch: found 1; expected 2 or more, because this loss"):
        validate(config)
