import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, GUIDANCE, flow_first, gaussian_params, make_batch
from formula_terms import compare, descent, recorded

from gadjax.errors import InputError
from gadjax.objectives import SIM, SiD

sg = jax.lax.stop_gradient


def loss(hand):
    """-d'(s_F - s_T) . (s_F - grad log q(x_t | x0)), in scores whose scale is removed."""
    x0, t = hand.x0(), hand.uniform_times()
    x_t = hand.noised(x0, t)
    alpha, sigma = hand.alpha_sigma(t)
    scale = alpha / sigma**2
    real, fake = hand.guided(hand.teacher, x_t, t, GUIDANCE), hand.guided(hand.critic, x_t, t, 1)
    real, fake = -real.eps / sigma, -fake.eps / sigma
    kernel = -(x_t - alpha * x0) / sigma**2
    u = (fake - real) / scale
    size = jnp.sqrt((u**2).mean((1, 2, 3), keepdims=True) + 0.3**2)
    return -(u / size * (fake - kernel) / scale).mean((1, 2, 3))


def critic_loss(hand):
    t, eps = hand.uniform_times(0, 1), hand.context.normal("eps")
    x0 = sg(hand.x0())
    raw = hand.world.denoiser.raw(hand.critic, hand.noised(x0, t), t, hand.batch.cond)
    target = eps if hand.world.kind == "eps" else eps - x0
    return ((raw - target) ** 2).mean((1, 2, 3))


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    compare(world, SIM(huber=0.3), loss, critic_loss)


@flow_first
def test_a_step_down_moves_the_student_towards_the_teacher(world):
    cosine, still = descent(world, SIM(huber=0.1), 512)
    assert cosine > 0.5 and still < 1e-4


def test_up_to_the_weight_of_a_sample_it_is_sid_with_alpha_one():
    world, batch = FLOW_WORLD, make_batch(64)
    nets = world.student_params(), gaussian_params(3), gaussian_params()
    huge = 1e6  # the square root is then a constant
    sim, sid = SIM(huber=huge), SiD()

    @jax.jit
    def run(*nets):
        context = world.context(sim, batch, *nets)
        x0, (product, _), (weighted, _) = context.student[0].x0, sim(context), sid(context)
        t = jnp.floor((0.02 + 0.96 * context.uniform("t")) * 1000) + 1
        alpha, sigma = (v[:, None, None, None] for v in world.schedule.alpha_sigma(t))
        x_t = alpha * x0 + sigma * context.normal("eps")
        norm = jnp.abs(x0 - context.teacher(x_t, t).x0).mean((1, 2, 3))
        return product * huge, weighted * norm

    np.testing.assert_allclose(*run(*nets), rtol=2e-3, atol=1e-4)


def test_both_networks_are_evaluated_at_uniform_times():
    calls, _ = recorded(FLOW_WORLD, SIM(low=0.2, high=0.4))
    assert {name for name, *_ in calls} == {"critic", "teacher"} and len(calls) == 2
    for _, t, _ in calls:
        assert t.min() > 200 and t.max() <= 400 and np.median(t) == pytest.approx(300, abs=10)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"huber": 0.0}, "objective.sim.huber: found 0.0; expected more than 0"),
        ({"high": 2.0}, "objective.sim.high: found 2.0; expected a share"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        SIM(**options)
