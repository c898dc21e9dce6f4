import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    GUIDANCE,
    WORLDS,
    all_worlds,
    gaussian_params,
    make_batch,
    mixture_params,
    one_step,
)
from formula_terms import compare

from gadjax.diffusion.schedules import add_noise
from gadjax.objectives import DMD, GAD, Anchor, SiD

B = 8


def by_hand(world, term, batch, student, critic, teacher, scales):
    """Loss by the docstring's formula, from the predictions alone."""
    context = world.context(term, batch, student, critic, teacher)
    span = world.schedule.last - world.schedule.clean
    share = 0.02 + 0.96 * context.uniform("t")
    t = jnp.floor(share * span) + world.schedule.clean + 1
    student_x0 = world.denoiser(student, context.x_BHWC, context.t_B, batch.cond).x0
    x_t = add_noise(world.schedule, student_x0, context.normal("eps"), t)

    def guided(params, scale):
        conditional = world.denoiser(params, x_t, t, batch.cond).x0
        unconditional = world.denoiser(params, x_t, t, batch.null).x0
        return unconditional + scale * (conditional - unconditional)

    real, fake = guided(teacher, scales[0]), guided(critic, scales[1])
    product = (real - fake) * ((real - student_x0) - term.alpha * (real - fake))
    norm = jnp.abs(student_x0 - real).mean((1, 2, 3))
    return product.mean((1, 2, 3)) / jax.lax.stop_gradient(norm)


@all_worlds
@pytest.mark.parametrize(
    "guidance,scales",
    [
        ("teacher", (GUIDANCE, 1)),
        ("lsg", (GUIDANCE, GUIDANCE)),
        ("zero", (1, 0)),
        ("anti", (1, -1)),
    ],
)
def test_the_loss_and_its_gradient_through_the_networks_inputs(world, guidance, scales):
    """Value and gradient equal those of the formula, with parameters and norm stop-gradiented."""
    term = SiD(alpha=1.2, guidance=guidance)
    with jax.enable_x64(True):
        batch = make_batch(B, dtype=float)
        student = world.student_params(bend=0.4, dtype=float)
        critic, teacher = gaussian_params(3, dtype=float), mixture_params(dtype=float)

        def ours(student):
            context = world.context(term, batch, student, critic, teacher)
            return term(context)[0].mean()

        def theirs(student):
            return by_hand(world, term, batch, student, critic, teacher, scales).mean()

        def both(f):
            return jax.value_and_grad(f)(student)

        (a, da), (b, db) = (
            jax.jit(both, static_argnums=0)(ours),
            jax.jit(both, static_argnums=0)(theirs),
        )
    assert float(a) == pytest.approx(float(b), rel=1e-6)
    for x, y in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
        # The times are float32 inside the step.
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * float(jnp.abs(y).max() + 1e-9))


@all_worlds
def test_the_weighting_of_sid_dit_is_one_minus_sigma(world):
    def loss(hand):
        x0, t = hand.x0(), hand.uniform_times()
        x_t = hand.noised(x0, t)
        real = hand.guided(hand.teacher, x_t, t, GUIDANCE).x0
        fake = hand.guided(hand.critic, x_t, t, 1).x0
        _, sigma = hand.alpha_sigma(t)
        return ((1 - sigma) * (real - fake) * (fake - x0)).mean((1, 2, 3))

    compare(world, SiD(weighting="1 - sigma"), loss)


def test_with_alpha_one_the_loss_is_the_gap_times_the_critics_error():
    world, term, batch = FLOW_WORLD, SiD(), make_batch(B)
    student, critic, teacher = world.student_params(), gaussian_params(3), mixture_params()

    @jax.jit
    def run():
        context = world.context(term, batch, student, critic, teacher)
        return term(context), context.student[0].x0

    (loss_B, metrics), x0 = run()

    @jax.jit
    def again():
        context = world.context(term, batch, student, critic, teacher)
        span = world.schedule.last - world.schedule.clean
        t = jnp.floor((0.02 + 0.96 * context.uniform("t")) * span) + world.schedule.clean + 1
        x_t = add_noise(world.schedule, x0, context.normal("eps"), t)
        real, fake = context.teacher(x_t, t).x0, context.critic(x_t, t).x0
        norm = jnp.abs(real - x0).mean((1, 2, 3))
        return ((real - fake) * (fake - x0)).mean((1, 2, 3)) / norm, jnp.abs(real - fake).mean()

    expected_B, gap = again()
    np.testing.assert_allclose(loss_B, expected_B, rtol=1e-4, atol=1e-6)
    assert float(metrics["gap"]) == pytest.approx(float(gap), rel=1e-5)


@all_worlds
def test_zero_with_no_gradient_where_critic_and_teacher_agree(world):
    term = SiD(guidance="lsg")

    def loss(student, teacher, batch):
        return term(world.context(term, batch, student, teacher, teacher))[0].mean()

    with jax.enable_x64(True):
        given = gaussian_params(dtype=float), make_batch(B, dtype=float)
        actual = jax.jit(jax.value_and_grad(loss))(world.student_params(dtype=float), *given)
        value, grad = jax.device_get(actual)
    # T - F is zero and the product with it too; its derivative is that of T - F, zero as well.
    assert abs(float(value)) < 1e-9
    assert max(np.abs(g).max() for g in jax.tree.leaves(grad)) < 1e-9


@pytest.mark.slow
def test_the_critic_is_trained_with_its_guidance():
    """Unconditional with "zero": the conditioning then has no effect."""
    world, batch = DDPM_WORLD, make_batch(B)
    other = batch._replace(cond=jax.tree.map(lambda x: x + 1.0, batch.cond))
    student, critic = world.student_params(), gaussian_params(3)

    def loss(term, conditional):
        # The student's own pictures must not see the other condition.
        context = world.context(term, batch, student, critic, None)
        return term.critic_loss(context.__class__(**{**vars(context), "batch": conditional}))

    for guidance, moves in (("zero", False), ("teacher", True), ("anti", True), ("lsg", True)):
        term = SiD(guidance=guidance)
        a, b = loss(term, batch), loss(term, other)
        assert bool(jnp.any(a != b)) == moves, guidance


@pytest.mark.parametrize("world", [one_step(DDPM_WORLD), one_step(FLOW_WORLD)], ids=WORLDS)
def test_one_step_with_gad(world):
    total, batch = SiD() + 0.5 * GAD(end="clean"), make_batch(B)
    student, critic, teacher = world.student_params(), gaussian_params(3), gaussian_params()
    loss_B, metrics = world.losses(total)(batch, student, critic, teacher)
    assert loss_B.shape == (B,) and bool(jnp.isfinite(loss_B).all())
    assert {"loss/sid", "loss/gad", "sid/gap", "gad/cosine"} <= set(metrics)


def test_the_anchor_takes_the_first_step():
    """With a detached first step neither SiD nor DMD changes the parameters of step one."""
    world, batch = FLOW_WORLD, make_batch(B)
    critic, teacher = gaussian_params(3), gaussian_params()
    for base in (SiD(), DMD()):

        def loss(student, base=base):
            context = world.context(base + Anchor(), batch, student, critic, teacher)
            return (1.0 * base)(context)[0].mean()

        grad = jax.jit(jax.grad(loss))(world.student_params())
        assert all(not np.any(g) for g in jax.tree.leaves(grad["step0"]))
        assert any(np.any(g) for g in jax.tree.leaves(grad["step1"]))
