from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, GUIDANCE, flow_first, law, make_batch, one_step
from formula_terms import compare, descent, networks_gradients, recorded

from gadjax.diffusion.denoiser import Denoiser
from gadjax.errors import InputError
from gadjax.objectives import VSD
from gadjax.training.context import Roles, make_context

sg = jax.lax.stop_gradient


def loss(hand):
    """SwiftBrush's code: 0.5 mse(x0, (x0 - sigma^2 (eps_T - eps_F)).detach()), both guided."""
    x0, t = hand.x0(), hand.uniform_times()
    x_t = sg(hand.noised(x0, t))
    real, fake = (hand.guided(p, x_t, t, GUIDANCE).eps for p in (hand.teacher, hand.critic))
    _, sigma = hand.alpha_sigma(t)
    target = sg(x0 - sigma**2 * (real - fake))
    return 0.5 * ((x0 - target) ** 2).mean((1, 2, 3))


def critic_loss(hand):
    """mean (alpha (eps_F - eps))^2, a tenth of the samples with the negative prompt."""
    t, eps = hand.uniform_times(0, 1), hand.context.normal("eps")
    x_t = hand.noised(sg(hand.x0()), t)
    alpha, _ = hand.alpha_sigma(t)
    cond, null = (
        hand.world.denoiser(hand.critic, x_t, t, c).eps for c in (hand.batch.cond, hand.batch.null)
    )
    dropped = (hand.context.uniform("dropout") < 0.4)[:, None, None, None]
    return ((alpha * (jnp.where(dropped, null, cond) - eps)) ** 2).mean((1, 2, 3))


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    compare(world, VSD(dropout=0.4), loss, critic_loss)


@flow_first
def test_a_step_down_moves_the_student_towards_the_teacher(world):
    cosine, still = descent(world, VSD())
    assert cosine > 0.5 and still < 1e-4


def test_the_networks_have_no_gradient_and_are_evaluated_at_uniform_times():
    assert not any(np.any(leaf) for leaf in networks_gradients(FLOW_WORLD, VSD()))
    calls, _ = recorded(FLOW_WORLD, VSD(low=0.2, high=0.4))
    assert [name for name, *_ in calls] == ["critic", "teacher"]
    for _, t, _ in calls:
        assert t.min() > 200 and t.max() <= 400 and np.median(t) == pytest.approx(300, abs=10)


def test_its_size_follows_the_distance_of_the_networks():
    """Twice the difference is twice the gradient: nothing normalises it."""
    world = one_step(FLOW_WORLD)
    student = world.student_params()
    critic = law(student["step0"]["matrix"], student["step0"]["bias"], 1e-3)
    batch = make_batch(32, text_scale=0.0)

    @jax.jit
    def slope(distance):
        teacher = critic | {"mean": critic["mean"] + distance}

        def loss(student):
            return VSD()(world.context(VSD(), batch, student, critic, teacher))[0].mean()

        return jax.grad(loss)(student)["step0"]["bias"]

    np.testing.assert_allclose(slope(0.2), 2 * slope(0.1), rtol=1e-3)


def test_an_embedded_scale_of_the_critic_is_that_of_its_training():
    """A critic that is the teacher at the run's guidance, at its own scale, leaves no gap."""

    def reads(params, x, t, cond):
        return params * x * cond.extras["guidance"][:, None, None, None]

    denoiser = Denoiser(reads, FLOW_WORLD.schedule, "flow", guidance_embedded=True)
    step_spec = replace(FLOW_WORLD.step_spec(VSD()), denoiser=denoiser.with_default_guidance(0.5))
    critic = jnp.float32(0.6)
    roles = Roles(critic, critic * 0.5 / step_spec.guidance, critic)
    context = make_context(step_spec, VSD().needs, roles, make_batch(4))
    _, metrics = VSD()(context)
    np.testing.assert_allclose(metrics["gap"], 0, atol=1e-6)
    x_t = context.batch.noise
    told = context.batch.cond._replace(extras={"guidance": jnp.full(len(x_t), 0.5)})
    trained = context.denoiser(context.critic_params, x_t, 300.0, context.batch.cond)
    np.testing.assert_array_equal(trained.eps, denoiser(critic, x_t, 300.0, told).eps)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"dropout": 1.0}, "objective.vsd.dropout: found 1.0; expected a share from 0 to below 1"),
        ({"low": -1.0}, "objective.vsd.low: found -1.0; expected a share"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        VSD(**options)
