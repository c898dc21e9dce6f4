from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    D,
    gaussian_params,
    later_steps,
    make_batch,
    one_step,
)

from gadjax.objectives import DMD, Anchor, GADLift, dmd
from gadjax.objectives.comparisons import gad_lift
from gadjax.types import Prediction


def slope(params, world, t):
    """Jacobian of the posterior mean [B, D, D] in float64; guidance does not change it."""
    alpha, sigma = (v[:, None] for v in world.schedule.alpha_sigma(np.asarray(t, float)))
    basis, variance = (np.asarray(params[k], float) for k in ("basis", "variance"))
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    return np.einsum("ij,bj,kj->bik", basis, gain, basis)


def test_gradient_is_the_difference_of_the_tangents_of_critic_and_teacher():
    world, samples, term = DDPM_WORLD, 32, GADLift(low=0.1, high=0.9)

    @jax.jit
    def run(batch, student, critic, teacher):
        context = world.context(term, batch, student, critic, teacher)
        value, dot = context.student

        def loss(dx0):
            pair = value, Prediction(dx0, dot.eps)
            return term(replace(context, student=pair))[0].sum()

        def of_primal(x0):
            pair = Prediction(x0, value.eps), dot
            return term(replace(context, student=pair))[0].sum()

        t = jnp.floor((0.1 + 0.8 * context.uniform("t")) * 1000)
        return jax.grad(loss)(dot.x0), jax.grad(of_primal)(value.x0), term(context)[0], dot.x0, t

    batch, critic, teacher = make_batch(samples), gaussian_params(3), gaussian_params(0)
    gradient, by_primal, loss_B, dx0, t = jax.device_get(
        run(batch, world.student_params(), critic, teacher)
    )
    assert np.all(by_primal == 0)
    alpha = world.schedule.alpha_sigma(t)[0]
    dx0 = dx0.reshape(samples, D).astype(float)
    fake, real = (
        np.einsum("bij,b,bj->bi", slope(p, world, t), alpha, dx0) for p in (critic, teacher)
    )
    expected = (fake - real) / np.abs(dx0 - real).mean(1, keepdims=True)
    np.testing.assert_allclose(
        gradient.reshape(samples, D) * D, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()
    )
    np.testing.assert_allclose(loss_B, 0.5 * (expected**2).mean(1), rtol=1e-3)


def test_its_mean_is_dmds_gradient_in_a_gaussian_world(monkeypatch):
    """E over z of <g(x0), dx0/dA> is E over v of <J_g dx0, d(J v)/dA>: Stein's lemma.

    It holds for the directions themselves, so that the normaliser of either is taken out.
    """
    for module in (dmd, gad_lift):
        monkeypatch.setattr(module, "mean_abs", lambda x: jnp.ones(len(x)))
    world = one_step(FLOW_WORLD)
    batch = make_batch(16384, text_scale=0.0)
    student, teacher = world.student_params(), gaussian_params(0) | {"mean": jnp.zeros(D)}
    student["step0"]["bias"] = jnp.zeros(D)
    critic = law(student)

    def gradient(term):
        def loss(student):
            return term(world.context(term, batch, student, critic, teacher))[0].mean()

        return np.asarray(jax.jit(jax.grad(loss))(student)["step0"]["matrix"], float).ravel()

    a, b = gradient(DMD()), gradient(GADLift())
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    ratio = np.linalg.norm(b) / np.linalg.norm(a)
    print("cosine", cosine, "ratio", ratio)
    assert cosine > 0.995 and 0.95 < ratio < 1.05


def law(student):
    """Distribution of a linear one-step student."""
    step = student["step0"]
    variance, basis = jnp.linalg.eigh(step["matrix"] @ step["matrix"].T)
    return {"mean": step["bias"], "basis": basis, "variance": jnp.maximum(variance, 0)}


def test_the_anchors_step_has_no_weight():
    world, batch = DDPM_WORLD, make_batch(16)
    student, critic, teacher = world.student_params(), gaussian_params(3), gaussian_params(0)
    term = 1.0 * GADLift()

    @jax.jit
    def run(student):
        masked = world.context(DMD() + term + Anchor(), batch, student, critic, teacher)
        plain = world.context(term, batch, student, critic, teacher)
        return term(masked)[0], term(plain)[0]

    masked, plain = jax.device_get(run(student))
    np.testing.assert_allclose(masked, plain * later_steps(16), rtol=1e-5)
