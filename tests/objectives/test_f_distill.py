import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    GUIDANCE,
    gaussian_params,
    make_batch,
    mixture_params,
    with_memory,
)
from formula_terms import SAMPLES, by_head, compare, head_params, pictures, with_features
from test_sim import critic_loss

from gadjax.errors import InputError
from gadjax.objectives import DMD, TERMS, Adversarial, Anchor, FDistill, build
from gadjax.objectives.common import update_bin_means
from gadjax.objectives.density_ratio import DIVERGENCES
from gadjax.training.context import Roles, make_context

sg = jax.lax.stop_gradient
WEIGHTS = {
    "rkl": lambda r: 1 + 0 * r,
    "kl": lambda r: r,
    "js": lambda r: 1 - 1 / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "hellinger": lambda r: r**0.5,
    "jeffreys": lambda r: 1 + r,
}
WORLD = with_features(FLOW_WORLD)


def formula(divergence, gan):
    """FastGen's: h(r) of the clipped ratio, of mean 1 in the batch, times DMD's direction."""

    def loss(hand):
        x0, t = hand.x0(), hand.uniform_times()
        x_t = sg(hand.noised(x0, t))
        r = jnp.clip(jnp.exp(jnp.clip(by_head(hand, x_t, t), -10, 10)), 0.1, 20)
        bins = jnp.floor(t / 1000.001 * 10).astype(int)  # of ten equal parts of the span
        same = bins[:, None] == bins[None, :]
        h = WEIGHTS[divergence](r / ((same * r).sum(1) / same.sum(1)))
        h = (h / h.mean())[:, None, None, None]
        real = hand.guided(hand.teacher, x_t, t, GUIDANCE).x0
        fake = hand.guided(hand.critic, x_t, t, 1).x0
        step = h * (fake - real) / jnp.abs(x0 - real).mean((1, 2, 3), keepdims=True)
        matching = 0.5 * ((x0 - sg(x0 - step)) ** 2).mean((1, 2, 3))
        other = hand.with_stream("gan")
        s = other.uniform_times(0, 1)
        return matching + gan * jnp.log1p(jnp.exp(-by_head(hand, other.noised(x0, s), s)))

    return loss


@pytest.mark.parametrize(
    "world,divergence,gan",
    [(FLOW_WORLD, "js", 0.3), (DDPM_WORLD, "neyman", 0.0)],
    ids=["flow", "ddpm"],
)
def test_losses_and_gradients_are_those_of_the_formula(world, divergence, gan):
    term = FDistill(divergence, gan=gan, hidden=6)
    head, x0 = head_params(term, float), pictures(float)
    compare(with_features(world), term, formula(divergence, gan), critic_loss, head, x0)


def test_the_seven_weights_are_those_of_the_code():
    r = np.geomspace(0.1, 20, 9)
    assert DIVERGENCES.keys() == WEIGHTS.keys() and len(WEIGHTS) == 7
    for name, h in DIVERGENCES.items():
        np.testing.assert_allclose(h(r), WEIGHTS[name](r), rtol=1e-6)


def losses(term, total=None, teacher=None):
    """Loss per sample and its gradients with respect to critic, teacher and discriminator."""
    batch = make_batch(SAMPLES)._replace(x0=pictures())
    student, head = WORLD.student_params(bend=0.2), head_params(FDistill(hidden=6))
    teacher = mixture_params() if teacher is None else teacher

    def loss(critic, teacher, head):
        needs = (total or term).needs
        roles = Roles(student, teacher, critic, head)
        context = make_context(WORLD.step_spec(term), needs, roles, batch)
        context = with_memory(term, context)
        loss_B = term(context)[0]
        return loss_B.mean(), (loss_B, context.base_weight_B)

    run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    slopes, aux = jax.device_get(run(gaussian_params(3), teacher, head))
    return *aux, jax.tree.leaves(slopes)


def test_with_a_weight_of_one_it_is_dmd_and_no_network_has_a_gradient():
    actual, _, slopes = losses(FDistill("rkl", gan=0.0, hidden=6))
    expected, *_ = losses(DMD())
    np.testing.assert_array_equal(actual, expected)
    *_, slopes = losses(FDistill("jeffreys", gan=0.0, hidden=6))
    assert not any(np.any(leaf) for leaf in slopes)


def test_beside_an_anchor_the_weights_have_mean_one_over_the_later_steps():
    term = FDistill("kl", gan=0.0, hidden=6, bins=0)
    plain, dmd = (losses(t, t + 0.05 * Anchor())[0] for t in (term, DMD()))
    weight = losses(term, term + 0.05 * Anchor())[1]
    ratio = np.sqrt(plain / dmd)  # the loss is half a square
    assert (ratio * weight).mean() == pytest.approx(1, rel=1e-4) and ratio.std() > 0.05


def test_its_discriminator_is_that_of_the_adversarial_term():
    term, other = FDistill(hidden=6), Adversarial(hidden=6)
    batch = make_batch(SAMPLES)._replace(x0=pictures())
    roles = Roles(WORLD.student_params(), None, gaussian_params(3), head_params(term))

    @jax.jit
    def run():
        context = make_context(WORLD.step_spec(term), other.needs, roles, batch)
        return term.discriminator_loss(context), other.discriminator_loss(context)

    np.testing.assert_array_equal(*run())
    a, b = (t.init_discriminator(jax.random.key(1), 4) for t in (term, other))
    assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    with pytest.raises(InputError, match="found 2 terms that train the discriminator"):
        build({"f_distill": {}, "adversarial": {}}, TERMS, FLOW_WORLD.times[:-1])


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"divergence": "tv"},
            "objective.f_distill.divergence: found 'tv'; expected one of",
        ),
        ({"features": "student"}, "objective.f_distill.features: found 'student'; expected one"),
        ({"gan": float("nan")}, "objective.f_distill.gan: found nan; expected 0 or more"),
        ({"high": 0.0}, "objective.f_distill.high: found 0.0; expected a share"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        FDistill(**options)


def test_means_of_the_ratio_are_those_of_each_bin():
    """With decay 0 the batch's, as FastGen has it by default; bins without a sample stay."""
    term, old = FDistill(bins=4, decay=0.75), jnp.array([1.0, 2.0, 4.0, 8.0])
    ratio, place = jnp.array([3.0, 5.0, 1.0, 7.0]), jnp.array([0, 0, 2, 3])
    expected = [0.75 * 1 + 0.25 * 4, 2.0, 0.75 * 4 + 0.25 * 1, 0.75 * 8 + 0.25 * 7]
    np.testing.assert_allclose(update_bin_means(old, ratio, place, 0.75), expected)
    np.testing.assert_allclose(update_bin_means(old, ratio, place, 0.0), [4, 2, 1, 7])
    actual = term.remember(old, {"ratio_B": ratio, "bin_B": place, "gap": 0.0})
    np.testing.assert_allclose(actual, expected)
    assert FDistill(bins=0).init_memory() is None and list(term.init_memory()) == [1] * 4
