from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, flow_first
from formula_terms import SAMPLES, make_batch, mixture_params

from gadjax.diffusion.denoiser import Denoiser
from gadjax.errors import InputError
from gadjax.objectives import TERMS, Tether, build
from gadjax.training.context import Roles, make_context


@pytest.mark.parametrize("end", ["next", "clean"])
@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world, end):
    """In float64: of both networks' steps from the student's own latent."""
    with jax.enable_x64(True):
        batch, term = make_batch(SAMPLES, dtype=float), Tether(end)
        student, start = (world.student_params(s, bend=0.4, dtype=float) for s in (1, 2))

        def context(student, start):
            roles = Roles(student, mixture_params(), networks={"start": start})
            return make_context(world.step_spec(term), term.needs, roles, batch)

        def by_hand(student, start):
            now = context(jax.lax.stop_gradient(student), start)
            given = now.x_BHWC, now.t_B, batch.cond
            a, b = (world.denoiser(params, *given) for params in (student, start))
            alpha, sigma = (v[:, None, None, None] for v in world.schedule.alpha_sigma(now.next_B))
            gap = alpha * (a.x0 - b.x0) + sigma * (a.eps - b.eps) if end == "next" else a.x0 - b.x0
            return jnp.mean(gap**2)

        def ours(student, start):
            return jnp.mean(term(context(student, start))[0])

        @jax.jit
        def run(student, start):
            return [
                jax.value_and_grad(ours, (0, 1))(student, start),
                jax.value_and_grad(by_hand)(student, start),
            ]

        (value, (slope, none)), expected = jax.device_get(run(student, start))
        same = float(jax.jit(ours)(student, student))
    assert same == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(none))
    for a, b in zip(jax.tree.leaves((value, slope)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_a_student_at_its_start_is_held_by_nothing_and_a_critic_is_used_as_it_is_trained():
    """Where guidance is an input of the network: all three are told the student's."""

    def reads(params, x, t, cond):
        return params * x * cond.extras["guidance"][:, None, None, None]

    denoiser = Denoiser(reads, FLOW_WORLD.schedule, "flow", guidance_embedded=True)
    step_spec = replace(
        FLOW_WORLD.step_spec(Tether()), denoiser=denoiser.with_default_guidance(0.4)
    )
    params = jnp.float32(0.7)
    roles = Roles(params, params, params, networks={"start": params})
    needs = replace(Tether().needs, critic=True)
    context = make_context(step_spec, needs, roles, make_batch(SAMPLES))
    loss, _ = Tether()(context)
    np.testing.assert_array_equal(loss, 0)
    x, t = context.x_BHWC, context.t_B
    raw = denoiser.with_default_guidance(0.4)(params, x, t, context.batch.cond)
    np.testing.assert_array_equal(context.critic(x, t).x0, raw.x0)
    assert np.any(context.critic(x, t, 1).x0 != raw.x0)


def test_the_start_is_a_network_of_the_run():
    total = build({"tether": {"weight": 0.1}}, TERMS, FLOW_WORLD.times[:-1])
    assert total.needs.networks == {"start": "start"}


def test_bad_options():
    with pytest.raises(InputError, match="^objective.tether.end: found 'whole'; expected"):
        Tether("whole")
    with pytest.raises(InputError, match="found a loss of the student's next latent"):
        build({"tether": {}}, TERMS, FLOW_WORLD.times[:-1], "fresh_noise")
    build({"tether": {"end": "clean"}}, TERMS, FLOW_WORLD.times[:-1], "fresh_noise")
