import jax
import jax.numpy as jnp
import pytest
from closed_form import FLOW_WORLD, GUIDANCE, flow_first, gaussian_params
from formula_terms import by_head, compare, head_params, pictures, with_features
from test_sim import critic_loss

from gadjax.errors import InputError
from gadjax.objectives import TERMS, UniDAD, build

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
