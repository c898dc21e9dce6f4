import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, GUIDANCE, flow_first
from formula_terms import compare, descent, networks_gradients, recorded

from gadjax.errors import InputError
from gadjax.objectives import CDM

sg = jax.lax.stop_gradient
FLOOR = 0.4  # between the distances of the samples


def size(x):
    return jnp.maximum(jnp.abs(x).mean((1, 2, 3), keepdims=True), FLOOR)


def moved(x0, direction, cond):
    """The code's: mean square of x0 and x0 + direction / size, without a half."""
    return ((x0 - sg(x0 + direction / size(x0 - cond))) ** 2).mean((1, 2, 3))


def matching(hand, x0):
    t = hand.uniform_times()
    x_t = sg(hand.noised(x0, t))
    fake, real = (hand.guided(p, x_t, t, 1).x0 for p in (hand.critic, hand.teacher))
    return moved(x0, real - fake, real)


def loss(hand):
    """byliutao/cdm, losses cfg + ddm + cdm of its configuration for SD3."""
    context, x0 = hand.context, hand.x0()
    clean = hand.world.schedule.clean
    s = (
        jnp.floor(context.uniform("guidance/t") * (jnp.float64(context.t_B) - clean - 1))
        + 1
        + clean
    )
    alpha, sigma = hand.alpha_sigma(s)
    x_s = sg(alpha * x0 + sigma * context.normal("guidance/eps"))
    cond, uncond = (hand.guided(hand.teacher, x_s, s, w).x0 for w in (1, 0))
    total = moved(x0, GUIDANCE * (cond - uncond), cond) + matching(hand, x0)
    off = hand.with_stream("off")
    t = off.uniform_times()
    given = context.x_BHWC, context.t_B, hand.batch.cond
    alpha, sigma = hand.alpha_sigma(t)
    eps = hand.world.denoiser(hand.student, *given).eps
    x_t = sg(alpha * x0 + sigma * eps)
    beside = hand.world.denoiser(hand.student, x_t, t, hand.batch.cond).x0
    return total + matching(off.with_stream("t0"), beside)


def critic_loss(hand):
    t, x0 = hand.uniform_times(), sg(hand.x0())
    eps = hand.context.normal("eps")
    alpha, sigma = hand.alpha_sigma(t)
    raw = hand.world.denoiser.raw(hand.critic, alpha * x0 + sigma * eps, t, hand.batch.cond)
    target = eps if hand.world.kind == "eps" else eps - x0
    return ((raw - target) ** 2).mean((1, 2, 3))


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    compare(world, CDM(floor=FLOOR), loss, critic_loss)


@pytest.mark.slow
def test_a_step_down_moves_the_student_towards_the_teacher():
    cosine, still = descent(FLOW_WORLD, CDM())
    assert cosine > 0.5 and still < 1e-4


def test_networks_get_no_gradient():
    assert not any(leaf.any() for leaf in networks_gradients(FLOW_WORLD, CDM()))


def test_guidance_looks_below_the_drawn_step_and_matching_at_all_times():
    calls, t_B = recorded(FLOW_WORLD, CDM())
    names = [(name, scale) for name, _, scale in calls]
    assert names == [("teacher", 1), ("teacher", 0), ("critic", None), ("teacher", 1)] * 1 + [
        ("critic", None),
        ("teacher", 1),
    ]
    assert np.all(calls[0][1] < t_B) and np.array_equal(calls[0][1], calls[1][1])
    for _, t, _ in calls[2:]:
        assert 20 <= t.min() < 60 and 940 < t.max() <= 980
    assert not np.array_equal(calls[2][1], calls[4][1])


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(floor=0.0), "objective.cdm.floor: found 0.0; expected more than 0"),
        (dict(low=1.5), "objective.cdm.low: found 1.5; expected a share from 0 to below 1"),
        (dict(low=0.5, high=0.2), "objective.cdm.high: found 0.2; expected a share from 0.5 to 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError) as error:
        CDM(**options)
    assert str(error.value) == message
