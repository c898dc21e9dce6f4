from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, GUIDANCE, flow_first, gaussian_params, loss_of_x0, make_batch
from formula_terms import compare, descent, networks_gradients, recorded
from test_sim import critic_loss

from gadjax.errors import InputError
from gadjax.objectives import DecoupledDMD

sg = jax.lax.stop_gradient
FLOOR = 0.4  # between the distances of the samples


def size(x):
    return jnp.maximum(jnp.abs(x).mean((1, 2, 3), keepdims=True), FLOOR)


def loss(hand):
    """Both parts with times, noises and normalisers of their own."""
    context, x0 = hand.context, hand.x0()
    t, clean = hand.uniform_times(0, 1), hand.world.schedule.clean
    x_t = sg(hand.noised(x0, t))
    fake, real = (hand.guided(p, x_t, t, 1).x0 for p in (hand.critic, hand.teacher))
    count = jnp.float64(context.t_B) - clean - 1
    s = jnp.floor(context.uniform("guidance/t") * count) + 1 + clean
    alpha, sigma = hand.alpha_sigma(s)
    x_s = sg(alpha * x0 + sigma * context.normal("guidance/eps"))
    cond, uncond = (hand.guided(hand.teacher, x_s, s, w).x0 for w in (1, 0))
    step = (real - fake) / size(x0 - real) + (GUIDANCE - 1) * (cond - uncond) / size(x0 - cond)
    return 0.5 * ((x0 - sg(x0 + step)) ** 2).mean((1, 2, 3))


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    compare(world, DecoupledDMD(floor=FLOOR), loss, critic_loss)


@flow_first
def test_a_step_down_moves_the_student_towards_the_teacher(world):
    cosine, still = descent(world, DecoupledDMD())
    assert cosine > 0.5 and still < 1e-4


def test_guidance_moves_along_the_difference_of_the_prompts():
    """Where critic and conditional teacher agree, only guidance is left; at scale 1 nothing is."""
    world, batch, teacher = FLOW_WORLD, make_batch(64), gaussian_params()
    term, student = DecoupledDMD(), world.student_params()

    @jax.jit
    def run(student):
        slopes = []
        for guidance in (GUIDANCE, 1.0):
            context = world.context(term, batch, student, teacher, teacher, guidance=guidance)
            slopes.append(jax.grad(loss_of_x0(term, context))(context.student[0].x0))
        return slopes

    guided, none = (np.asarray(v, float) for v in run(student))
    # A gaussian's guided mean moves by text - negative, in the directions that t has left open.
    texts = np.asarray(batch.cond.text - batch.null.text, float).reshape(guided.shape)
    cosine = (-guided * texts).sum() / np.sqrt((guided**2).sum() * (texts**2).sum())
    assert cosine > 0.5 and np.abs(none).max() < 1e-5


def test_guidance_has_a_time_of_its_own_below_the_drawn_steps():
    calls, t_B = recorded(FLOW_WORLD, DecoupledDMD())
    assert [(name, scale) for name, _, scale in calls] == [
        ("critic", None),
        ("teacher", 1),
        ("teacher", 1),
        ("teacher", 0),
    ]
    critic, real, cond, uncond = (t for _, t, _ in calls)
    np.testing.assert_array_equal(critic, real)
    np.testing.assert_array_equal(cond, uncond)
    assert np.all(cond < t_B) and cond.min() >= 1
    assert critic.max() > 990 and critic.min() < 10
    for start in np.unique(t_B):
        drawn = cond[t_B == start]
        assert np.median(drawn) == pytest.approx(start / 2, rel=0.1) and drawn.max() > 0.98 * start
    assert abs(np.corrcoef(critic, cond / t_B)[0, 1]) < 0.1


def test_the_networks_have_no_gradient():
    assert not any(np.any(leaf) for leaf in networks_gradients(FLOW_WORLD, DecoupledDMD()))


def test_refusals():
    with pytest.raises(InputError, match=r"objective.decoupled_dmd.low: found 1.0; expected a"):
        DecoupledDMD(low=1.0)
    with pytest.raises(
        InputError, match=r"objective.decoupled_dmd.floor: found 0.0; expected more"
    ):
        DecoupledDMD(floor=0.0)
    embedded = replace(FLOW_WORLD.denoiser, guidance_embedded=True)
    message = "objective.decoupled_dmd: found a teacher with embedded guidance; expected one"
    with pytest.raises(InputError, match=message):
        DecoupledDMD().check_denoiser(embedded)
    DecoupledDMD().check_denoiser(FLOW_WORLD.denoiser)
