import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    FLOW_WORLD,
    GUIDANCE,
    D,
    flat,
    flow_first,
    gaussian_params,
    loss_of_x0,
    make_batch,
)
from formula_terms import SAMPLES, by_head, compare, head_params, pictures, with_features
from test_sim import critic_loss

from gadjax.errors import InputError
from gadjax.objectives import TERMS, UniDAD, build
from gadjax.training.context import Roles, make_context

sg = jax.lax.stop_gradient
GAN, SHARE = 0.3, 0.7


def formula(target):
    def loss(hand):
        """(1 - a) DMD of the source + a DMD of the target, and -log D as softplus."""
        x0, t = hand.x0(), hand.uniform_times()
        x_t = sg(hand.noised(x0, t))
        fake = hand.guided(hand.critic, x_t, t, 1).x0
        sides = [fake - hand.guided(p, x_t, t, GUIDANCE).x0 for p in (hand.teacher, target)]
        step = (1 - SHARE) * sides[0] + SHARE * sides[1]
        step = step / jnp.abs(x0 - fake).mean((1, 2, 3), keepdims=True)
        matching = 0.5 * ((x0 - sg(x0 - step)) ** 2).mean((1, 2, 3))
        other = hand.with_stream("gan")
        s = other.uniform_times(0, 1)
        return matching + GAN * jnp.log1p(jnp.exp(-by_head(hand, other.noised(x0, s), s)))

    return loss


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    term = UniDAD("a folder", share=SHARE, gan=GAN, hidden=6)
    with jax.enable_x64(True):
        target = gaussian_params(8, dtype=float)
    head, x0 = head_params(term, float), pictures(float)
    networks = {"uni_dad/target": target}
    loss = formula(target)
    compare(with_features(world), term, loss, critic_loss, head, x0, networks)


def test_the_target_is_a_network_of_the_run():
    total = build({"uni_dad": {"target": "some/folder"}}, TERMS, FLOW_WORLD.times[:-1])
    assert total.needs.networks == {"uni_dad/target": "some/folder"} and total.needs.images


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(), "objective.uni_dad.target: found nothing; expected a diffusers folder or a"),
        (dict(target="x", share=1.5), "objective.uni_dad.share: found 1.5; expected a share"),
        (dict(target="x", gan=-1.0), "objective.uni_dad.gan: found -1.0; expected 0 or more"),
        (dict(target="x", low=2.0), "objective.uni_dad.low: found 2.0; expected a share"),
        (dict(target="x", features="x"), "objective.uni_dad.features: found 'x'; expected"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError) as error:
        UniDAD(**options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_step_down_moves_the_student_towards_the_share_of_both_teachers(share):
    """Laws that differ in their means alone, so that their x0 differ by a positive map of those."""
    world, batch = with_features(FLOW_WORLD), make_batch(SAMPLES, text_scale=0.0)
    term = UniDAD("a folder", share=share, gan=0.0, hidden=6)
    critic, shift = gaussian_params(3), np.random.default_rng(2).normal(size=(2, D))
    teacher, target = (critic | {"mean": critic["mean"] + by} for by in shift)

    @jax.jit
    def slope(teacher, target):
        networks = {"uni_dad/target": target}
        roles = Roles(world.student_params(), teacher, critic, head_params(term), networks=networks)
        context = make_context(world.step_spec(term), term.needs, roles, batch)
        return jax.grad(loss_of_x0(term, context))(context.student[0].x0)

    towards = (1 - share) * shift[0] + share * shift[1]
    assert (flat(slope(teacher, target)) @ towards < 0).all()
    assert np.abs(slope(critic, critic)).max() < 1e-6
