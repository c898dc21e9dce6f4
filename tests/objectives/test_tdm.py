import jax
import numpy as np
import pytest
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    GUIDANCE,
    D,
    all_worlds,
    gaussian_params,
    later_steps,
    loss_of_x0,
    make_batch,
)

from gadjax.objectives import TDM, Anchor
from gadjax.training.backward_simulation import stratified_step_indices

B = 64


def test_tau_lies_within_the_drawn_steps_interval():
    """From the next time (at least `floor`) to `gap` below the step's time: all integers there."""
    world, term, samples = DDPM_WORLD, TDM(floor=50, gap=40), 4096
    batch, student = make_batch(samples), world.student_params()

    @jax.jit
    def run(batch, student):
        context = world.context(term, batch, student, gaussian_params(3), gaussian_params(0))
        return term.renoised(context)[1]

    tau = np.asarray(run(batch, student))
    np.testing.assert_array_equal(tau, np.floor(tau))
    for k in range(4):
        drawn = tau[stratified_step_indices(np.arange(samples), 4) == k]
        low, high = max(50, world.times[k + 1]), world.times[k] - 40
        assert drawn.min() >= low and drawn.max() < high
        assert drawn.min() < low + 5 and drawn.max() >= high - 5


@all_worlds
@pytest.mark.parametrize("huber", [0.0, 0.05])
def test_gradient_is_critic_minus_teacher_at_the_renoised_next_latent(world, huber):
    term = TDM(huber=huber)

    @jax.jit
    def run(batch, student, critic, teacher):
        context = world.context(term, batch, student, critic, teacher)
        pred = context.student[0]
        _, tau, fresh = term.renoised(context)

        def put(t):
            return [v[:, None, None, None] for v in world.schedule.alpha_sigma(t)]

        # The student's DDIM step, then the forward process from there to tau.
        (b, r), (a, s) = put(context.next_B), put(tau)
        spread = (s**2 - (a * r / b) ** 2) ** 0.5
        x_tau = a / b * (b * pred.x0 + r * pred.eps) + spread * fresh
        fake = world.denoiser(critic, x_tau, tau, batch.cond).x0
        real = world.denoiser.guided(teacher, x_tau, tau, batch.cond, batch.null, GUIDANCE).x0
        return jax.grad(loss_of_x0(term, context))(pred.x0), term(context)[0], pred.x0, fake, real

    batch, critic, teacher = make_batch(B), gaussian_params(3), gaussian_params(0)
    gradient, loss_B, x0, fake, real = jax.device_get(
        run(batch, world.student_params(), critic, teacher)
    )
    norm = np.abs(x0 - real).mean((1, 2, 3), keepdims=True)
    g = fake - real
    length = np.sqrt(g**2 + huber**2)
    expected = g / length / norm if huber else g / norm
    np.testing.assert_allclose(gradient * D, expected, rtol=1e-3, atol=1e-3)
    value = ((length - huber) / norm) if huber else 0.5 * (g / norm) ** 2
    np.testing.assert_allclose(loss_B, value.mean((1, 2, 3)), rtol=1e-3)


def test_the_critics_loss_is_reweighted_denoising_of_the_students_x0():
    world, term = FLOW_WORLD, TDM(max_snr=2.0)

    @jax.jit
    def run(batch, student, critic):
        context = world.context(term, batch, student, critic, None)
        x_tau, tau, fresh = term.renoised(context)
        pred = world.denoiser(critic, x_tau, tau, batch.cond).x0
        return term.critic_loss(context), context.student[0].x0, x_tau, tau, fresh, pred

    batch, critic = make_batch(B), gaussian_params(3)
    loss_B, x0, x_tau, tau, fresh, pred = jax.device_get(run(batch, world.student_params(), critic))
    sigma = (tau / 1000)[:, None, None, None]
    mix = (x_tau - (1 - sigma) * x0) / sigma
    density = np.exp((fresh**2 - mix**2).mean((1, 2, 3)) / 2)
    snr = ((1 - sigma) / sigma).reshape(B) ** 2
    assert snr.min() < 2 < snr.max()
    expected = density * np.minimum(snr, 2) * ((pred - x0) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(loss_B, expected, rtol=1e-3)


def test_the_anchors_step_has_no_weight():
    world, batch = DDPM_WORLD, make_batch(B)
    student, critic, teacher = world.student_params(), gaussian_params(3), gaussian_params(0)
    total = 1.0 * TDM()

    @jax.jit
    def run(student, critic, teacher):
        context = world.context(TDM() + Anchor(), batch, student, critic, teacher)
        alone = world.context(TDM(), batch, student, critic, teacher)
        return [(total(c)[0], total.critic_loss(c)) for c in (context, alone)]

    masked, plain = jax.device_get(run(student, critic, teacher))
    weight = later_steps(B)
    for a, b in zip(masked, plain, strict=True):
        np.testing.assert_allclose(a, b * weight, rtol=1e-5)
