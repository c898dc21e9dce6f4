from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import DDPM_WORLD, FLOW_WORLD, all_worlds, flow_first, make_batch, mixture_params
from formula_terms import (
    BLOCKS,
    CLOSE,
    SAMPLES,
    WIDTH,
    Hand,
    compare,
    head_params,
    pictures,
    with_features,
)
from tiny_run import config_file

from gadjax.diffusion.denoiser import Denoiser
from gadjax.errors import InputError
from gadjax.objectives import LADD, TERMS, build
from gadjax.objectives.time_laws import log_normal_times
from gadjax.training.config import read_config
from gadjax.training.context import Roles, make_context
from gadjax.training.setup import prepare

TERM = LADD((0, 2), mismatched=True, r1=0.3, hidden=6)


def head_logit(head, tokens):
    """Logit of one sample's tokens [N, D]."""
    x = tokens - tokens.mean(1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(1, keepdims=True) + 1)
    x = jax.nn.gelu(x @ head["linear_1"]["kernel"] + head["linear_1"]["bias"])
    return (x @ head["linear_2"]["kernel"] + head["linear_2"]["bias"]).mean()


def by_heads(hand: Hand, x0):
    """Tokens after each block of the noised x0, and the logits of their heads, one by one."""
    t = log_normal_times(hand.context, TERM.mean, TERM.std)
    x_t = hand.noised(x0, t)
    tokens = hand.world.denoiser.features(hand.teacher, x_t, t, hand.batch.cond, blocks=(0, 2))
    heads = [hand.context.discriminator_params[f"block_{k}"] for k in (0, 2)]
    return tokens, [
        jax.vmap(lambda x, h=h: head_logit(h, x))(x) for h, x in zip(heads, tokens, strict=True)
    ]


def student_loss(hand):
    _, (first, second) = by_heads(hand, hand.x0())
    return -(first + second) / 2


def heads_loss(hand):
    """As SANA-Sprint's code: a hinge of all logits, the fakes joined, R1 at the head's input."""
    tokens, real = by_heads(hand, hand.batch.x0)
    shifted = jnp.concatenate([hand.batch.x0[-1:], hand.batch.x0[:-1]])
    fakes = [by_heads(hand, x0)[1] for x0 in (hand.x0(), shifted)]
    total = 0.0
    for k, (block, x) in enumerate(zip((0, 2), tokens, strict=True)):
        head = hand.context.discriminator_params[f"block_{block}"]
        fake = (jnp.maximum(1 + fakes[0][k], 0) + jnp.maximum(1 + fakes[1][k], 0)) / 2
        slope = jax.vmap(jax.grad(head_logit, 1), (None, 0))(head, x)
        total += 0.5 * (fake + jnp.maximum(1 - real[k], 0)) + 0.3 * (slope**2).sum((1, 2))
    return total / 2


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    head, x0 = head_params(TERM, float), pictures(float)
    compare(with_features(world), TERM, student_loss, head=head, x0=x0)


@pytest.mark.slow
@all_worlds
def test_the_heads_learn_and_nothing_else_does(world):
    """The heads' loss and gradients, in float64, are the formula's; the networks' are 0."""
    world = with_features(world)
    with jax.enable_x64(True):
        batch = make_batch(SAMPLES, dtype=float)._replace(x0=pictures(float))
        heads = jax.tree.map(lambda p: 4 * p, head_params(TERM, float))  # beyond the hinge's corner
        nets = heads, world.student_params(bend=0.4, dtype=float)
        nets = *nets, mixture_params(dtype=float)

        def context(head, student, teacher):
            roles = Roles(student, teacher, None, head)
            return make_context(world.step_spec(TERM), TERM.needs, roles, batch)

        def ours(*nets):
            return TERM.discriminator_loss(context(*nets)).mean()

        def theirs(head, student, teacher):
            given = context(head, student, teacher)
            return heads_loss(Hand(world, given, student, None, teacher)).mean()

        run = jax.jit(lambda *nets: jax.value_and_grad(ours, (0, 1, 2))(*nets))
        value, (slope, *others) = jax.device_get(run(*nets))
        expected = jax.device_get(jax.jit(jax.value_and_grad(theirs))(*nets))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))
    for a, b in zip(jax.tree.leaves((value, slope)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=CLOSE, atol=CLOSE * np.abs(b).max())
        assert np.abs(b).max() > 1e-6


def test_without_options_its_fakes_are_the_students_alone():
    world, term = with_features(FLOW_WORLD), LADD((0, 2), hidden=6)
    batch = make_batch(SAMPLES)._replace(x0=pictures())
    roles = Roles(world.student_params(), mixture_params(), None, head_params(term))

    @jax.jit
    def run():
        context = make_context(world.step_spec(term), term.needs, roles, batch)
        same = replace(context, student=(context.student[0]._replace(x0=batch.x0), None))
        full = replace(TERM, r1=0.0).discriminator_loss(same), term.discriminator_loss(same)
        logit_KB = term.logits(same, term.tokens(same, batch.x0))
        hinge = jax.nn.relu(1 + logit_KB) + jax.nn.relu(1 - logit_KB)
        return *full, hinge.mean(0) / 2

    mixed, plain, expected = run()
    np.testing.assert_allclose(plain, expected, rtol=1e-5)
    assert not np.allclose(mixed, plain, rtol=1e-3)  # the shifted pictures
    assert TERM.needs.joint and not term.needs.joint
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(logits_at_the_start(term)))


def logits_at_the_start(term):
    heads = term.init_discriminator(jax.random.key(0), WIDTH)
    kernels = [head["linear_1"]["kernel"] for head in heads.values()]
    assert not np.allclose(*kernels)
    return [head["linear_2"] for head in heads.values()]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"blocks": ()}, "objective.ladd.blocks: found (); expected rising block numbers from 0"),
        ({"blocks": [2, 1]}, "objective.ladd.blocks: found (2, 1); expected rising block numbers"),
        ({"blocks": [-1]}, "objective.ladd.blocks: found (-1,); expected rising block numbers"),
        ({"blocks": [0.5]}, "objective.ladd.blocks: found (0.5,); expected rising block numbers"),
        ({"std": 0.0}, "objective.ladd.std: found 0.0; expected more than 0"),
        ({"r1": -1.0}, "objective.ladd.r1: found -1.0; expected 0 or more"),
        ({"hidden": 0}, "objective.ladd.hidden: found 0; expected 1 or more"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError) as caught:
        build({"ladd": options}, TERMS, DDPM_WORLD.times[:-1])
    assert str(caught.value).startswith(message)


def test_blocks_that_the_teacher_does_not_have_are_refused():
    def check(blocks, feature_blocks):
        denoiser = Denoiser(None, None, "eps", lambda *_: None, feature_blocks)
        build({"ladd": {"blocks": blocks}}, TERMS, (900.0,)).check_denoiser(denoiser)

    check((0, BLOCKS - 1), BLOCKS)
    with pytest.raises(
        InputError, match="^objective.ladd.blocks: found 3; expected numbers below 3"
    ):
        check((0, 3), 3)
    with pytest.raises(InputError, match="without features of single blocks; expected a PixArt"):
        check((0,), 0)


def test_a_run_of_sprint_is_set_up(tmp_path):
    """On the bundled teacher; refused for blocks that it does not have, and for microbatches."""

    def prepared(blocks, **more):
        path = config_file(
            tmp_path / "config.py",
            teacher="asset:shapes_teacher",
            objective={"consistency": {}, "ladd": {"blocks": blocks, "mismatched": True}},
            student={"steps": 2, "timesteps": (900, 400), "latents": "data"},
            data={"world": "gadjax.worlds.shapes", "length": 16},
            **more,
        )
        return prepare(read_config(["--config", str(path)]), abstract=True)

    run = prepared((1, 4))
    state = jax.eval_shape(run.start, run.initial_params)
    assert state.params["discriminator"]["block_4"]["linear_1"]["kernel"].shape == (96, 256)
    with pytest.raises(
        InputError, match="^objective.ladd.blocks: found 8; expected numbers below 6"
    ):
        prepared((1, 8))
    with pytest.raises(InputError, match="microbatches"):
        prepared((1, 4), batch=4, microbatches=2)
