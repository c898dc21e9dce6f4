"""Properties of all objectives, and differences between them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    D,
    gaussian_map,
    gaussian_params,
    law,
    make_batch,
    mixture_params,
    one_step,
)

from gadjax.objectives import DMD, GAD, TDM, Anchor, Denoising, GADLift, GADScript, Regression

# Every term, in sums that may stand together.
SUMS = {
    "drawn steps": DMD() + GADLift() + GADScript() + GAD() + Regression("clean") + Anchor("x0"),
    "whole rollout": DMD(backprop="all") + GAD("clean") + Anchor(),
    "trajectory": TDM() + Regression(),
}
all_sums = pytest.mark.parametrize("total", SUMS.values(), ids=SUMS)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@all_sums
def test_the_students_loss_reaches_the_student_alone(total):
    world, batch = DDPM_WORLD, make_batch(16)

    def loss(student, critic, teacher):
        loss_B, metrics = total(world.context(total, batch, student, critic, teacher))
        assert loss_B.shape == (16,) and loss_B.dtype == jnp.float32
        return loss_B.mean(), (loss_B, metrics)

    run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    given = world.student_params(bend=0.3), mixture_params(3), mixture_params(0)
    (student, critic, teacher), values = run(*given)
    assert all(np.all(leaf == 0) for leaf in leaves((critic, teacher)))
    assert all(np.all(leaf != 0) and np.all(np.isfinite(leaf)) for leaf in leaves(student))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves(values))


@all_sums
def test_the_critics_loss_reaches_the_critic_alone(total):
    world, batch = FLOW_WORLD, make_batch(16)

    def loss(student, critic):
        context = world.context(total, batch, student, critic, mixture_params(0))
        loss_B = total.critic_loss(context)
        assert loss_B.shape == (16,) and loss_B.dtype == jnp.float32
        return loss_B.mean()

    run = jax.jit(jax.grad(loss, (0, 1)))
    student, critic = run(world.student_params(bend=0.3), mixture_params(3))
    assert all(np.all(leaf == 0) for leaf in leaves(student))
    assert all(np.all(leaf != 0) and np.all(np.isfinite(leaf)) for leaf in leaves(critic))


@all_sums
def test_a_samples_loss_depends_on_that_sample_alone(total):
    """Draws depend on the sample's key, so that they move with it to another place."""
    world, batch = FLOW_WORLD, make_batch(8)
    given = world.student_params(bend=0.3), mixture_params(3), mixture_params(0)
    run = jax.jit(lambda batch: total(world.context(total, batch, *given))[0])
    turned = jax.tree.map(lambda v: jnp.roll(v, 2, axis=0), batch)
    np.testing.assert_allclose(run(turned), np.roll(run(batch), 2), rtol=1e-4, atol=1e-6)


def descend(world, total, start, teacher, updates=300):
    """Train a linear one-step student with an exact critic."""
    adam = optax.adam(optax.cosine_decay_schedule(0.05, updates))

    def update(carry, i):
        matrix, state = carry
        batch = make_batch(256, text_scale=0.0)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i), 256)
        noise = jax.vmap(lambda k: jax.random.normal(k, batch.noise.shape[1:]))(keys)
        batch = batch._replace(key=keys, noise=noise)
        critic = jax.lax.stop_gradient(law(matrix, floor=1e-6))

        def loss(matrix):
            student = {"step0": {"matrix": matrix, "bias": jnp.zeros(D), "bend": jnp.zeros(D)}}
            return total(world.context(total, batch, student, critic, teacher))[0].mean()

        updates, state = adam.update(jax.grad(loss)(matrix), state)
        return (optax.apply_updates(matrix, updates), state), None

    run = jax.jit(lambda m: jax.lax.scan(update, (m, adam.init(m)), jnp.arange(updates))[0][0])
    return np.asarray(run(jnp.float32(start)), float)


@pytest.mark.slow
def test_matching_distributions_keeps_a_rotated_map_and_gad_turns_it_back():
    """Noise is isotropic, so that A z and A R z have one distribution: neither DMD nor the tangent
    of its gradient depends on R. GAD does, because the teacher's map is of the same z."""
    world = one_step(FLOW_WORLD)
    teacher = gaussian_params() | {"mean": jnp.zeros(D), "variance": jnp.geomspace(0.2, 1.5, D)}
    ends = [np.full(1, t) for t in world.times]
    right = gaussian_map(teacher, world.schedule, np.zeros((1, D)), *ends, 0)[1][0]
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(D, D)))[0]
    start = 0.6 * right @ rotation

    def errors(matrix):
        expected = right @ right.T
        covariance = np.linalg.norm(matrix @ matrix.T - expected) / np.linalg.norm(expected)
        return covariance, np.linalg.norm(matrix - right) / np.linalg.norm(right)

    matching = DMD() + GADLift()
    blind = errors(descend(world, matching, start, teacher))
    seeing = errors(descend(world, matching + GAD(steps=32, loss="square"), start, teacher))
    print("start", errors(start), "without", blind, "with", seeing)
    assert errors(start)[0] > 0.5 and blind[0] < 0.1 and seeing[0] < 0.1
    assert blind[1] > 1 and seeing[1] < 0.05


def test_denoising_asks_for_pictures_and_nothing_else():
    needs = Denoising().needs
    assert needs.images and not (needs.student or needs.critic or needs.maps or needs.endpoint)
