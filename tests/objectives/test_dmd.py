from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    GUIDANCE,
    D,
    all_worlds,
    gaussian_params,
    law,
    loss_of_x0,
    make_batch,
    one_step,
)
from formula_terms import compare, recorded

from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError
from gadjax.objectives import DMD, Anchor
from gadjax.objectives.base import first_step_weights
from gadjax.training.backward_simulation import stratified_step_indices

B = 64


@all_worlds
def test_gradient_is_critic_minus_teacher_over_the_mean_distance(world):
    term = DMD(low=0.1, high=0.9)

    @jax.jit
    def run(batch, student, critic, teacher):
        context = world.context(term, batch, student, critic, teacher)
        x0 = context.student[0].x0
        t = jnp.floor((0.1 + 0.8 * context.uniform("t")) * 1000) + world.schedule.clean + 1
        x_t = add_noise(world.schedule, x0, context.normal("eps"), t)
        fake = world.denoiser(critic, x_t, t, batch.cond).x0
        real = world.denoiser.guided(teacher, x_t, t, batch.cond, batch.null, GUIDANCE).x0
        return jax.grad(loss_of_x0(term, context))(x0), term(context), t, x0, fake, real

    batch, critic, teacher = make_batch(B), gaussian_params(3), gaussian_params(0)
    gradient, (loss_B, metrics), t, x0, fake, real = jax.device_get(
        run(batch, world.student_params(), critic, teacher)
    )
    assert t.min() >= 100 + world.schedule.clean and t.max() <= 901 and len(set(t.tolist())) > 40
    expected = (fake - real) / np.abs(x0 - real).mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(gradient * D, expected, rtol=1e-3, atol=1e-5)
    # The value is that of half the squared direction: nothing else is in it.
    np.testing.assert_allclose(loss_B, 0.5 * (expected**2).mean((1, 2, 3)), rtol=1e-4)
    assert loss_B.shape == (B,) and loss_B.dtype == np.float32
    np.testing.assert_allclose(metrics["gap"], np.abs(fake - real).mean(), rtol=1e-5)


def test_a_step_down_moves_the_student_towards_the_teacher():
    """The critic has the student's distribution, and the teacher's differs in the mean alone."""
    world = one_step(DDPM_WORLD)
    student = world.student_params()
    critic = law(student["step0"]["matrix"], student["step0"]["bias"])
    critic["variance"] += 1e-3
    towards = np.linspace(-1, 1, D, dtype=np.float32)
    teacher = critic | {"mean": critic["mean"] + towards}
    batch = make_batch(B, text_scale=0.0)

    def loss(student, critic, teacher):
        return DMD()(world.context(DMD(), batch, student, critic, teacher))[0].mean()

    gradient = jax.jit(jax.grad(loss))
    slope = np.asarray(gradient(student, critic, teacher)["step0"]["bias"])
    assert -slope @ towards > 0.1 * np.linalg.norm(slope) * np.linalg.norm(towards)
    still = gradient(student, critic, critic)
    assert all(np.abs(leaf).max() < 1e-4 for leaf in jax.tree.leaves(jax.device_get(still)))


def test_a_student_equal_to_the_teachers_mean_has_a_bounded_gradient():
    """The distance by which the gradient is divided is then zero."""
    world = one_step(FLOW_WORLD)
    student = jax.tree.map(jnp.zeros_like, world.student_params())
    teacher = gaussian_params(0) | {"variance": jnp.zeros(D), "mean": jnp.zeros(D)}
    batch = make_batch(4, text_scale=0.0)
    loss_B, metrics = world.losses(DMD())(batch, student, gaussian_params(3), teacher)
    # Rounding leaves a distance of about 1e-8; what is divided by is the floor of 1e-4.
    assert 1e6 < np.max(loss_B) < 100 * float(metrics["gap"]) ** 2 / 1e-8


def per_step(gradient):
    return [np.abs(np.asarray(step["matrix"])).max() for step in gradient.values()]


def test_detaching_the_first_step_removes_dmds_gradient_there_and_only_there():
    """Backpropagation through the full rollout, with and without a detached first step."""
    world = FLOW_WORLD
    batch, critic, teacher = make_batch(B), gaussian_params(3), gaussian_params(0)
    student, dmd = world.student_params(bend=0.3), DMD(backprop="all")
    assert (dmd + 0.05 * Anchor()).needs.detach_first_step and not dmd.needs.detach_first_step

    @jax.jit
    def gradients(student, critic, teacher):
        def loss(student, cut):
            needs = replace(dmd.needs, detach_first_step=cut)
            context = world.context(Asks(dmd, needs), batch, student, critic, teacher)
            return dmd(context)[0].mean()

        return [jax.value_and_grad(loss)(student, cut) for cut in (True, False)]

    (with_cut, cut), (without, uncut) = gradients(student, critic, teacher)
    assert float(with_cut) == float(without)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(cut["step0"]))
    assert per_step(uncut)[0] > 1e-5
    for k in range(1, 4):
        assert per_step(cut)[k] > 1e-5
        for a, b in zip(*map(jax.tree.leaves, (cut[f"step{k}"], uncut[f"step{k}"])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


class Asks:
    """A term with needs of our choosing."""

    def __init__(self, term, needs):
        self.term, self.needs = term, needs


def test_gradients_of_a_full_rollout_pass_through_every_step():
    """Not only the last one: the first step's share is the chain through all the others."""
    world, dmd = DDPM_WORLD, DMD(backprop="all")
    batch, critic, teacher = make_batch(B), gaussian_params(3), gaussian_params(0)
    student = world.student_params()

    # DMD's loss is no function whose differences could be taken; its gradient is that of
    # <g, x0(student)> with g held.
    @jax.jit
    def run(student):
        context = world.context(dmd, batch, student, critic, teacher)

        def of_end(x0):
            return dmd(replace(context, endpoint=x0))[0].mean()

        def of_student(student):
            return dmd(world.context(dmd, batch, student, critic, teacher))[0].mean()

        return jax.grad(of_end)(context.endpoint), jax.grad(of_student)(student)

    held, actual = jax.device_get(run(student))
    g = held.astype(float).reshape(B, D)
    alpha, sigma = world.schedule.alpha_sigma(np.array(world.times))
    text = np.asarray(batch.cond.text[:, 0], float)
    x = [np.asarray(batch.noise, float).reshape(B, D)]
    slopes = []
    for k in range(4):
        matrix, bias = (np.asarray(student[f"step{k}"][n], float) for n in ("matrix", "bias"))
        a = sigma[k + 1] / sigma[k]
        reach = alpha[k + 1] - a * alpha[k]
        slopes.append((reach, a * np.eye(D) + reach * matrix))
        x.append(a * x[-1] + reach * (x[-1] @ matrix.T + bias + text))
    for k in reversed(range(4)):
        reach, slope = slopes[k]
        expected = reach * g.T @ x[k]
        np.testing.assert_allclose(
            actual[f"step{k}"]["matrix"], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
        )
        g = g @ slope


def test_the_anchors_step_has_no_weight_in_the_mean():
    world = DDPM_WORLD
    batch, critic, teacher = make_batch(B), gaussian_params(3), gaussian_params(0)
    total = DMD() + 0.05 * Anchor()
    student = world.student_params()

    @jax.jit
    def run(student):
        def masked(student):
            context = world.context(total, batch, student, critic, teacher)
            loss_B = (1.0 * DMD())(context)[0]
            return loss_B.mean(), (loss_B, context.base_weight_B, first_step_weights(context))

        alone = world.context(DMD(), batch, student, critic, teacher)
        (_, actual), slope = jax.value_and_grad(masked, has_aux=True)(student)
        return actual, slope, (1.0 * DMD())(alone)[0]

    (masked, weight, first), slope, plain = jax.device_get(run(student))
    step = stratified_step_indices(np.arange(B), 4)
    np.testing.assert_allclose(weight, np.where(step > 0, 4 / 3, 0), rtol=1e-6)
    np.testing.assert_array_equal(masked[step == 0], 0)
    np.testing.assert_allclose(masked, plain * weight, rtol=1e-6)
    np.testing.assert_allclose(masked.mean(), plain[step > 0].mean(), rtol=1e-5)
    np.testing.assert_array_equal(first, np.where(step == 0, 4, 0))

    assert per_step(slope)[0] == 0 and min(per_step(slope)[1:]) > 0


def test_the_critic_learns_to_denoise_the_students_samples():
    """Its loss is least at the posterior of the student's samples."""
    world, samples = one_step(FLOW_WORLD), 4096
    student = world.student_params()
    right = law(student["step0"]["matrix"], student["step0"]["bias"])
    batch = make_batch(samples, text_scale=0.0)

    @jax.jit
    def run(critic):
        context = world.context(DMD(), batch, student, critic, None)
        eps, x0 = context.normal("eps"), context.student[0].x0
        t = jnp.floor(context.uniform("t") * 1000) + 1  # all of the span
        x_t = add_noise(world.schedule, x0, eps, t)
        by_hand = (world.denoiser.raw(critic, x_t, t, batch.cond) - (eps - x0)) ** 2
        return DMD().critic_loss(context), by_hand.mean((1, 2, 3))

    def loss_B(critic):
        actual, expected = run(critic)
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
        return np.asarray(actual, float)

    least = loss_B(right)
    assert least.shape == (samples,)
    for wrong in (
        right | {"mean": right["mean"] + 0.3},
        right | {"variance": 2 * right["variance"]},
        right | {"variance": right["variance"] / 2},
    ):
        more = loss_B(wrong) - least
        assert more.mean() > 4 * more.std() / samples**0.5

    @jax.jit
    def mean_slopes(critic):
        def one(critic, batch):
            context = world.context(DMD(), batch, student, critic, None)
            return DMD().critic_loss(context).mean()

        parts = jax.tree.map(lambda v: v.reshape(64, -1, *v.shape[1:]), batch)
        return jax.lax.map(lambda part: jax.grad(one)(critic, part), parts)

    for name in ("mean", "variance"):
        slopes = np.asarray(mean_slopes(right)[name], float)
        error = slopes.std(0) / len(slopes) ** 0.5
        assert np.all(np.abs(slopes.mean(0)) < 4 * error + 1e-6)


@all_worlds
@pytest.mark.parametrize("options", [{"normalizer": "x_t"}, {"guidance_range": (2.0, 5.0)}])
def test_options_change_the_formula(world, options):
    """DP-DMD's normaliser is mean|x_t - T|; PG-SB's guidance is drawn for each sample."""

    def loss(hand):
        x0, t, scale = hand.x0(), hand.uniform_times(), GUIDANCE
        x_t = jax.lax.stop_gradient(hand.noised(x0, t))
        if "guidance_range" in options:
            scale = 2 + 3 * hand.context.uniform("guidance")
        fake = hand.guided(hand.critic, x_t, t, 1).x0
        real = hand.guided(hand.teacher, x_t, t, scale).x0
        distance = x_t - real if "normalizer" in options else x0 - real
        step = (real - fake) / jnp.abs(distance).mean((1, 2, 3), keepdims=True)
        target = jax.lax.stop_gradient(x0 + step)
        return 0.5 * ((x0 - target) ** 2).mean((1, 2, 3))

    compare(world, DMD(**options), loss)


def test_guidance_is_uniform_in_its_range_for_the_teacher_alone():
    calls, _ = recorded(FLOW_WORLD, DMD(guidance_range=(2.0, 5.0)))
    (_, _, critic_scale), (_, _, scale_B) = calls
    assert critic_scale is None and scale_B.shape == (2048,)
    assert 2 <= scale_B.min() < 2.02 and 4.98 < scale_B.max() < 5
    assert np.median(scale_B) == pytest.approx(3.5, abs=0.1)
    with pytest.raises(InputError, match=r"objective.dmd.guidance_range: found \(5.0, 2.0\); "):
        DMD(guidance_range=(5.0, 2.0))
    for bad in ((2.0,), (1.0, float("nan")), ("a", "b")):
        with pytest.raises(InputError, match="expected two numbers in order, or"):
            DMD(guidance_range=bad)


def test_unknown_backprop():
    with pytest.raises(InputError, match="objective.dmd.backprop: found 'last'"):
        DMD(backprop="last")
