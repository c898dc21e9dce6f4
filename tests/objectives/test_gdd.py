"""The discriminator of pictures, which `gdd` and `flash_dmd` share, and `gdd`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, flow_first, make_batch
from formula_pixels import (
    autoencoder,
    decode,
    discriminator_params,
    logits_by_hand,
    with_pixels,
)
from formula_terms import SAMPLES, compare, pictures
from tiny_run import config_file

from gadjax.errors import InputError
from gadjax.objectives import GDD, TERMS, build
from gadjax.training.config import read_config
from gadjax.training.context import Roles, make_context
from gadjax.training.setup import prepare

TERM = GDD(width=3, r1=0.4)


def student_loss(hand):
    """-log sigmoid of each logit of the student's pictures."""
    image = decode(hand.context.networks["vae"], hand.x0())
    logits = logits_by_hand(hand.context.discriminator_params, image)
    return -jnp.log(1 / (1 + jnp.exp(-logits))).mean(0)


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    head = discriminator_params(TERM, float)
    compare(
        with_pixels(world),
        TERM,
        student_loss,
        head=head,
        x0=pictures(float),
        networks=autoencoder(float),
    )


def test_the_discriminators_loss_is_the_formulas_and_stops_at_the_pictures():
    """In float64; R1 by a sample's own gradient, with the code's factor of a half."""
    world = with_pixels(FLOW_WORLD)

    def by_hand(params, fake, real):
        def of_one(image):
            return logits_by_hand(params, image[None]).sum()

        slope = jax.vmap(jax.grad(of_one))(real)
        fakes, reals = (logits_by_hand(params, image) for image in (fake, real))
        losses = -jnp.log(1 / (1 + jnp.exp(fakes))) - jnp.log(1 / (1 + jnp.exp(-reals)))
        return losses.mean(0) + TERM.r1 / 2 * (slope**2).sum((1, 2, 3))

    with jax.enable_x64(True):
        batch = make_batch(SAMPLES, dtype=float)._replace(x0=pictures(float))
        nets = discriminator_params(TERM, float), world.student_params(bend=0.4, dtype=float)

        def context(params, student):
            roles = Roles(student, discriminator=params, networks=autoencoder(float))
            return make_context(world.step_spec(TERM), TERM.needs, roles, batch)

        def ours(*nets):
            return TERM.discriminator_loss(context(*nets))

        def theirs(*nets):
            given = context(*nets)
            fake, real = (
                jax.lax.stop_gradient(decode(given.networks["vae"], x))
                for x in (given.student[0].x0, batch.x0)
            )
            return by_hand(nets[0], fake, real)

        @jax.jit
        def run(*nets):
            def both(f):
                return f(*nets), jax.grad(lambda *nets: f(*nets).mean(), (0, 1))(*nets)

            return both(ours), both(theirs)

        actual, expected = jax.device_get(run(*nets))
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * max(1e-9, np.abs(b).max()))
    (_, (slopes, student)) = actual
    assert all(np.abs(leaf).max() > 1e-9 for leaf in jax.tree.leaves(slopes))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(student))


def test_the_student_follows_the_discriminator_to_what_it_takes_for_real():
    """A step down the student's loss raises the logits; the discriminator's loss lowers them."""
    world = with_pixels(FLOW_WORLD)
    batch = make_batch(SAMPLES)._replace(x0=pictures())
    params, student = discriminator_params(TERM), world.student_params()

    @jax.jit
    def run(params, student):
        def context(params, student):
            roles = Roles(student, discriminator=params, networks=autoencoder())
            return make_context(world.step_spec(TERM), TERM.needs, roles, batch)

        def logit(params, student):
            return TERM(context(params, student))[1]["logit"]

        def moved(params, slopes):
            return jax.tree.map(lambda p, s: p - 1e-3 * s, params, slopes)

        down = jax.grad(lambda s: TERM(context(params, s))[0].mean())(student)
        back = jax.grad(lambda p: TERM.discriminator_loss(context(p, student)).mean())(params)
        start = logit(params, student)
        return logit(params, moved(student, down)) - start, logit(moved(params, back), student) - (
            start
        )

    better, worse = run(params, student)
    assert better > 0 > worse


def test_a_discriminator_at_its_start_has_logits_of_zero():
    params = TERM.init_discriminator(jax.random.key(0), 3)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    assert not np.any(logits_by_hand(params, image))
    assert np.std(params["conv_0"]["kernel"]) > 0.1


def test_a_run_keeps_the_autoencoder_and_no_teacher(tmp_path):
    path = config_file(
        tmp_path / "config.py",
        teacher="asset:shapes_teacher",
        objective={"gdd": {}},
        student={"steps": 1, "timesteps": (900,)},
        data={"world": "gadjax.worlds.shapes", "length": 16},
        preview={"every": 0},
    )
    run = prepare(read_config(["--config", str(path)]), abstract=True)
    assert run.networks(run.frozen)["vae"] is run.frozen["vae"]
    assert run.pipeline.backbone not in run.frozen and not TERM.needs.uses_teacher
    state = jax.eval_shape(run.start, run.initial_params)
    assert state.params["discriminator"]["conv_0"]["kernel"].shape == (3, 3, 3, 32)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"width": 0}, "objective.gdd.width: found 0; expected 1 or more"),
        ({"r1": -0.1}, "objective.gdd.r1: found -0.1; expected 0 or more"),
        ({"gan": 1.0}, "objective.gdd: found 'gan'; expected weight, r1, width"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        build({"gdd": options}, TERMS, FLOW_WORLD.times[:-1])
