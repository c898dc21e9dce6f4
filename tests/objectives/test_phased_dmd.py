import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, GUIDANCE, flow_first, gaussian_params, make_batch
from formula_terms import compare, descent, networks_gradients, recorded

from gadjax.errors import InputError
from gadjax.objectives import PhasedDMD

sg = jax.lax.stop_gradient


def diffused(hand):
    """End of the drawn step, and what it becomes at a later time by the forward process."""
    context = hand.context
    given = context.x_BHWC, context.t_B, hand.batch.cond
    pred = hand.world.denoiser(hand.student, *given)
    alpha_s, sigma_s = hand.alpha_sigma(context.next_B)
    x_s = alpha_s * pred.x0 + sigma_s * pred.eps
    s = jnp.float64(context.next_B)
    alpha_s, sigma_s = hand.alpha_sigma(s)
    t = s + jnp.floor(context.uniform("t") * jnp.floor(hand.world.schedule.last - s)) + 1
    alpha, sigma = hand.alpha_sigma(t)
    rho = jnp.sqrt(sigma**2 - (alpha / alpha_s) ** 2 * sigma_s**2)
    eps = context.normal("eps")
    return x_s, alpha / alpha_s * x_s + rho * eps, t, eps, (alpha, sigma, alpha_s, sigma_s, rho)


def loss(hand):
    x_s, x_t, t, *_ = diffused(hand)
    x_t = sg(x_t)
    real = hand.guided(hand.teacher, x_t, t, GUIDANCE).x0
    fake = hand.guided(hand.critic, x_t, t, 1).x0
    step = (fake - real) / jnp.abs(x_t - real).mean((1, 2, 3), keepdims=True)
    return 0.5 * ((x_s - sg(x_s - step)) ** 2).mean((1, 2, 3))


def critic_loss(hand):
    """The paper's velocity for a flow; for eps the same score, -eps / rho, times -sigma."""
    x_s, x_t, t, eps, (alpha, sigma, alpha_s, sigma_s, rho) = diffused(hand)
    x_s, x_t = sg((x_s, x_t))
    raw = hand.world.denoiser.raw(hand.critic, x_t, t, hand.batch.cond)
    target = sigma / rho * eps
    if hand.world.kind == "flow":
        gain = (alpha_s**2 * sigma + alpha * sigma_s**2) / (alpha_s**2 * rho)
        target = gain * eps - x_s / alpha_s
    weight = jnp.minimum(1 / rho**2, 10.0)[:, 0, 0, 0]
    return weight * ((raw - target) ** 2).mean((1, 2, 3))


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    compare(world, PhasedDMD(), loss, critic_loss)


def test_a_step_down_moves_the_student_towards_the_teacher():
    cosine, still = descent(FLOW_WORLD, PhasedDMD())
    assert cosine > 0.5 and still < 1e-4


def test_networks_get_no_gradient():
    assert not any(leaf.any() for leaf in networks_gradients(FLOW_WORLD, PhasedDMD()))


def test_each_step_is_matched_above_its_own_end():
    """At all times between the next time of the grid and the last one, and at no other."""
    (_, t, _), (_, same, _) = (calls := recorded(FLOW_WORLD, PhasedDMD())[0])[:2]
    _, t_B = recorded(FLOW_WORLD, PhasedDMD())
    assert [name for name, *_ in calls] == ["critic", "teacher"] and np.array_equal(t, same)
    times = FLOW_WORLD.times
    for start, end in zip(times[:-1], times[1:], strict=True):
        of_step = t[t_B == start]
        assert of_step.min() > end and of_step.max() <= 1000
        assert of_step.min() < end + 0.1 * (1000 - end) and of_step.max() > 1000 - 0.1 * (
            1000 - end
        )


def test_the_critics_best_answer_is_the_score_of_the_diffused_latents():
    """Of Gaussian latents x_s the loss is least, over scalings, at their own posterior mean."""
    world, batch = FLOW_WORLD, make_batch(4096)
    term = PhasedDMD(max_weight=1.0)
    student, critic = world.student_params(), gaussian_params(3)

    @jax.jit
    def run():
        context = world.context(term, batch, student, critic, gaussian_params())
        x_s, x_t, t_B, eps = term.diffused(context)
        alpha, sigma = (v[:, None, None, None] for v in world.schedule.alpha_sigma(t_B))
        alpha_s, sigma_s = (
            v[:, None, None, None] for v in world.schedule.alpha_sigma(context.next_B)
        )
        rho = jnp.sqrt(sigma**2 - (alpha * sigma_s / alpha_s) ** 2)
        gain = (alpha_s**2 * sigma + alpha * sigma_s**2) / (alpha_s**2 * rho)
        target = gain * eps - x_s / alpha_s  # of the loss
        return jnp.mean((x_t + sigma**2 * (-eps / rho) - alpha * (eps * sigma / rho - target)) ** 2)

    assert float(run()) < 1e-8  # x0* = eps* - velocity, on the line x_t = alpha x0* + sigma eps*


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_bad_options(weight):
    with pytest.raises(
        InputError, match="^objective.phased_dmd.max_weight: found .*; expected more"
    ):
        PhasedDMD(max_weight=weight)
