"""Laws of every term: which network each loss trains, whose a sample's loss is, what it stands
beside."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from all_terms import OBJECTIVES, ONE_STEP, B, objective_of, setting

from gadjax.objectives import Sum
from gadjax.training.context import make_context
from gadjax.training.steps import CRITICS, make_roles, student_step

# Networks through whose inputs the student's gradient passes; all others are stop-gradiented.
JUDGED_BY_CRITIC = dict.fromkeys(("adversarial", "f_distill", "uni_dad"), {"critic"})
PASSED = JUDGED_BY_CRITIC | {
    "sid": {"critic", "teacher"},
    "sfd": {"critic", "teacher"},
    "sim": {"critic", "teacher"},
    "uni_instruct": {"critic", "teacher"},
    "ladd": {"teacher"},
    "ladd mismatched": {"teacher"},
    "gdd": {"vae"},
    "flash_dmd": {"vae"},
}
# The discriminator's features are the critic's, which it trains with a share of its gradient.
TRAINS_CRITIC = {"uni_instruct", *JUDGED_BY_CRITIC}
# Few of all, and the slow tier has them all.
QUICK = "sfd", "ladd", "disback"


def losses(name):
    """Function (networks by group, batch) -> role -> loss per sample [B], and its arguments."""
    spec, state, networks, batch = setting(name)
    step_spec, objective = spec(), Sum(()) + objective_of(name)
    needs, roles = objective.needs, [role for role in CRITICS if role in state.params]

    def run(trained, networks, ema, batch):
        rest = batch, state.step, state.memory
        now = make_roles(trained, networks, ema if needs.ema else None)
        found = {"student": objective(make_context(step_spec, needs, now, *rest))[0]}
        of_trainers = replace(objective.trainer_needs(roles), critic=False, discriminator=False)
        context = make_context(step_spec, of_trainers, now, *rest)
        return found | {role: getattr(objective, f"{role}_loss")(context) for role in roles}

    return run, (state.params, networks, state.ema), batch


def marked(name):
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in OBJECTIVES])
def test_each_loss_trains_its_own_network_and_depends_on_its_own_sample(name):
    with jax.enable_x64(True):
        run, given, batch = losses(name)

        @jax.jit
        def both(given, batch):
            values = run(*given, batch)
            slopes = {
                role: jax.grad(lambda given, role=role: run(*given, batch)[role].mean())(given)
                for role in values
            }
            return values, slopes

        values, slopes = jax.device_get(both(given, batch))
        turned = jax.tree.map(lambda x: jnp.roll(x, 2, axis=0), batch)
        moved = jax.device_get(both(given, turned)[0])
    discriminator = {"discriminator"} & values.keys()
    expected = {
        "student": {"student"} | PASSED.get(name, set()) | discriminator,
        "critic": {"critic"},
        "discriminator": discriminator | ({"critic"} if name in TRAINS_CRITIC else set()),
    }
    for role, (trained, networks, ema) in slopes.items():
        groups = {**networks, **trained, "ema": ema}
        sizes = {k: [np.abs(x).max() for x in jax.tree.leaves(v)] for k, v in groups.items()}
        assert {k for k, size in sizes.items() if any(size)} == expected[role], role
    assert all(v.shape == (B,) and np.all(np.isfinite(v)) for v in values.values())
    if not objective_of(name).needs.joint:
        for role, value in values.items():
            tiny = 1e-9 * np.abs(value).max()
            np.testing.assert_allclose(moved[role], np.roll(value, 2), rtol=1e-9, atol=tiny)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_weight_of_zero_leaves_no_trace(name):
    zero = {term: {"weight": 0.0} for term in ("gad", "anchor") if term not in OBJECTIVES[name]}
    with_zero, plain = objective_of(name, zero), objective_of(name)
    assert with_zero.parts == plain.parts and with_zero.names == plain.names


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gad_and_the_anchor_stand_beside_it(name):
    """The update is traced with both; a student of one step has no later one for an anchor."""
    more = {"gad": {"steps": 1}} | ({} if name in ONE_STEP else {"anchor": {"steps": 1}})
    more = {key: options for key, options in more.items() if key not in OBJECTIVES[name]}
    with jax.enable_x64(True):
        spec, *given = setting(name, more)
        state, metrics = jax.eval_shape(lambda *given: student_step(spec(), *given), *given)
    assert {f"loss/{term}" for term in more} <= metrics.keys()
    assert jax.tree.structure(state.params) == jax.tree.structure(given[0].params)
