import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    FLOW_WORLD,
    GUIDANCE,
    flat,
    flow_first,
    gaussian_params,
    loss_of_x0,
    make_batch,
)
from formula_terms import SAMPLES, compare
from test_sim import critic_loss

from gadjax.errors import InputError
from gadjax.objectives import SFD, TERMS, Regression, SiD, build
from gadjax.types import Cond

FORGET = 0.3
LABEL = np.arange(SAMPLES) % 3 == 0


def versions(dtype=float, same=~LABEL):
    """The teacher's prompts: the batch's own where `same`."""
    own = make_batch(SAMPLES, dtype=dtype).cond
    other = make_batch(SAMPLES, seed=9, dtype=dtype).cond.text
    text = jnp.where(same[:, None, None], own.text, other)
    return {"override": Cond(text, own.mask), "label": jnp.asarray(LABEL, jnp.int32)}


def factor():
    return jnp.where(LABEL, FORGET, 1.0)


def student_loss(hand):
    """`sid_g_loss_conditional` of the authors' code, alpha 1.2, as means over elements."""
    x0, t = hand.x0(), hand.uniform_times()
    x = hand.noised(x0, t)
    forgotten = hand.batch.override
    half = [hand.world.denoiser(hand.teacher, x, t, c).x0 for c in (forgotten, hand.batch.null)]
    p_x = half[1] + GUIDANCE * (half[0] - half[1])
    sg_x = hand.guided(hand.critic, x, t, 1).x0
    omega = jax.lax.stop_gradient(jnp.abs(p_x - x0).mean((1, 2, 3), keepdims=True))
    loss = ((p_x - sg_x) * ((p_x - x0) - 1.2 * (p_x - sg_x)) / omega).mean((1, 2, 3))
    return factor() * loss


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    with jax.enable_x64(True):
        more = versions()
    term = SFD(alpha=1.2, forget=FORGET)
    compare(world, term, student_loss, lambda hand: factor() * critic_loss(hand), more=more)


def test_prompts_that_do_not_differ_have_the_loss_of_sid():
    world, student = FLOW_WORLD, FLOW_WORLD.student_params()
    nets = student, gaussian_params(3), gaussian_params(4)
    batch = make_batch(SAMPLES)._replace(**versions(jnp.float32))
    sfd = world.losses(SFD())(batch, *nets)[0]
    sid = world.losses(SiD())(batch._replace(override=None), *nets)[0]
    np.testing.assert_allclose(sfd[~LABEL], sid[~LABEL], rtol=1e-6)
    assert (np.abs(sfd - sid)[LABEL] > 1e-3).all()


def test_maps_of_other_terms_are_of_the_replaced_prompts():
    """`gad` and `anchor` beside it do not bring the concept back."""
    batch = make_batch(SAMPLES)._replace(**versions(jnp.float32))
    total = SFD() + 0.3 * Regression(steps=2)
    nets = FLOW_WORLD.student_params(), gaussian_params(3), gaussian_params(4)

    def end(batch):
        context = FLOW_WORLD.context(total, batch, *nets)
        return next(iter(context.maps.values()))[0]

    expected = end(batch._replace(cond=batch.override, override=None))
    plain = end(batch._replace(override=None))
    # Later steps start at the student's latents, which are those of its own prompts.
    first = np.asarray(FLOW_WORLD.context(total, batch, *nets).step_B) == 0
    np.testing.assert_allclose(end(batch)[first], expected[first], rtol=1e-5, atol=1e-6)
    assert np.abs(end(batch) - plain)[first & LABEL].max() > 1e-3


@pytest.mark.parametrize(
    "options,message",
    [
        ({"forget": -1.0}, "objective.sfd.forget: found -1.0; expected 0 or more"),
        ({"guidance": "x"}, "objective.sid.guidance: found 'x'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        build({"sfd": options}, TERMS, FLOW_WORLD.times[:-1])


def test_a_step_down_moves_forgotten_prompts_towards_the_others_and_leaves_the_rest():
    """Critic and teacher are one network, that of the student's law: only the prompts differ."""
    world, net = FLOW_WORLD, gaussian_params(3)
    batch = make_batch(SAMPLES)._replace(**versions(jnp.float32))
    term = SFD()

    @jax.jit
    def slope():
        context = world.context(term, batch, world.student_params(), net, net, guidance=1.0)
        return jax.grad(loss_of_x0(term, context))(context.student[0].x0)

    along = (flat(slope()) * flat(batch.override.text - batch.cond.text)).sum(1)
    assert (along[LABEL] < -1e-6).all()
    assert np.abs(flat(slope())[~LABEL]).max() < 1e-6 * np.abs(slope()).max()
