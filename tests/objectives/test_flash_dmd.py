import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, GUIDANCE, flow_first, make_batch
from formula_pixels import autoencoder, decode, discriminator_params, logits_by_hand, with_pixels
from formula_terms import SAMPLES, compare, pictures
from test_sim import critic_loss

from gadjax.errors import InputError
from gadjax.objectives import TERMS, FlashDMD, build
from gadjax.training.context import Roles, make_context

sg = jax.lax.stop_gradient
TERM = FlashDMD(early=2, gan=0.3, width=3)


def student_loss(hand):
    """DMD where the drawn step is the first or the second, -log D of the picture elsewhere."""
    x0, t = hand.x0(), hand.uniform_times()
    x_t = sg(hand.noised(x0, t))
    fake, real = hand.guided(hand.critic, x_t, t, 1).x0, hand.guided(hand.teacher, x_t, t, GUIDANCE)
    step = (fake - real.x0) / jnp.abs(x0 - real.x0).mean((1, 2, 3), keepdims=True)
    matching = 0.5 * ((x0 - sg(x0 - step)) ** 2).mean((1, 2, 3))
    image = decode(hand.context.networks["vae"], x0)
    logits = logits_by_hand(hand.context.discriminator_params, image)
    late = hand.context.t_B < (hand.world.times[1] + hand.world.times[2]) / 2
    return jnp.where(late, 0.3 * jnp.log1p(jnp.exp(-logits)).mean(0), matching)


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    head = discriminator_params(TERM, float)
    networks, x0 = autoencoder(float), pictures(float)
    compare(with_pixels(world), TERM, student_loss, critic_loss, head, x0, networks)


def test_early_steps_know_no_discriminator_and_late_ones_no_teacher():
    world, batch = with_pixels(FLOW_WORLD), make_batch(SAMPLES)._replace(x0=pictures())
    head, student = discriminator_params(TERM), world.student_params()
    critic, teacher = (world.student_params(seed) for seed in (2, 3))

    @jax.jit
    def run(head, teacher):
        def losses(head, teacher):
            roles = Roles(student, teacher, critic, head, networks=autoencoder())
            context = make_context(world.step_spec(TERM), TERM.needs, roles, batch)
            return TERM(context)[0], context.step_B

        start, step_B = losses(head, teacher)
        other = jax.tree.map(lambda p: 1.5 * p, (head, teacher))
        return start, losses(other[0], teacher)[0], losses(head, other[1])[0], step_B

    start, of_head, of_teacher, step_B = map(np.asarray, run(head, teacher))
    early = step_B < 2
    assert early.any() and not early.all()
    assert ((start == of_head) == early).all() and ((start == of_teacher) == ~early).all()


def test_it_is_summed_with_gad_and_the_anchor_and_has_one_discriminator():
    config = {"flash_dmd": {}, "gad": {"weight": 0.3}, "anchor": {"weight": 0.05}}
    assert build(config, TERMS, FLOW_WORLD.times[:-1]).needs.pixels
    with pytest.raises(InputError, match="found 2 terms that train the discriminator"):
        build({"flash_dmd": {}, "gdd": {}}, TERMS, FLOW_WORLD.times[:-1])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"early": 0}, "objective.flash_dmd.early: found 0; expected 1 or more"),
        ({"early": 4}, "objective.flash_dmd.early: found 4 of 4 steps; expected fewer"),
        ({"gan": -1.0}, "objective.flash_dmd.gan: found -1.0; expected 0 or more"),
        ({"width": 0}, "objective.flash_dmd.width: found 0; expected 1 or more"),
        ({"low": 1.5}, "objective.flash_dmd.low: found 1.5; expected a share"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        build({"flash_dmd": options}, TERMS, FLOW_WORLD.times[:-1])
