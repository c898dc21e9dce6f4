"""Experts by step: which network a sample's time chooses, and what that costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.experts import Experts, by_time
from gadjax.diffusion.rollout import rollout
from gadjax.diffusion.schedules import Flow
from gadjax.types import Cond, TextKV

COND = Cond(jnp.ones((4, 1, 1)), jnp.ones((4, 1)))
X = jnp.arange(4.0).reshape(4, 1, 1, 1) + 1


def apply(params, x_BHWC, t_B, cond):
    return params["scale"] * x_BHWC + t_B[:, None, None, None]


def network(scale):
    return {"scale": jnp.float32(scale)}


TWO = Experts(network(2.0), network(3.0), 500.0)
THREE = Experts(Experts(network(2.0), network(3.0), 750.0), network(5.0), 250.0)


@pytest.mark.parametrize(
    "experts,times,scales",
    [
        (TWO, (900, 501, 900, 999), (2, 2, 2, 2)),
        (TWO, (500, 0, 100, 3), (3, 3, 3, 3)),
        (TWO, (900, 0, 500, 501), (2, 3, 3, 2)),
        (THREE, (900, 751, 999, 800), (2, 2, 2, 2)),
        (THREE, (900, 600, 250, 251), (2, 3, 5, 3)),
        (network(7.0), (900, 0, 500, 501), (7, 7, 7, 7)),
    ],
)
def test_each_sample_has_the_expert_of_its_time(experts, times, scales):
    t_B = jnp.array(times, jnp.float32)
    expected = np.array(scales)[:, None, None, None] * X + t_B[:, None, None, None]
    np.testing.assert_array_equal(
        jax.jit(by_time, static_argnums=0)(apply, experts, X, t_B, COND), expected
    )


@pytest.mark.parametrize("time,needed", [(900.0, "early"), (100.0, "late")])
def test_an_expert_that_no_sample_is_for_is_not_evaluated(time, needed):
    """A product with its NaN would reach the gradient, which zeros alone do not stop."""
    nan, good = network(np.nan), network(2.0)
    experts = Experts(*(good, nan) if needed == "early" else (nan, good), 500.0)

    def total(x):
        return by_time(apply, experts, x, jnp.full(4, time), COND).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(X), jnp.full_like(X, 2.0))


def test_tangents_and_gradients_through_a_rollout_of_both():
    """Steps of both in one scan, against the product of their slopes in float64."""
    with jax.enable_x64():
        schedule, times = Flow(), jnp.array([1000.0, 750.0, 500.0, 250.0, 0.0])
        denoiser = Denoiser(lambda p, x, t, cond: p["scale"] * x, schedule, "flow")
        x = jnp.asarray(np.asarray(X), jnp.float64)

        def end(early, late, x):
            experts = Experts({"scale": early}, {"scale": late}, 600.0)
            return rollout(lambda x, t: denoiser(experts, x, t, COND), schedule, x, times).end

        def by_hand(early, late, x):  # x' = scale x: Euler's factor of a step of a quarter
            return (1 - early / 4) ** 2 * (1 - late / 4) ** 2 * x

        given = jnp.float64(0.3), jnp.float64(-0.7), x
        tangent = (jnp.float64(1.0), jnp.float64(2.0), x**2)
        for a, b in zip(
            *(jax.jvp(jax.jit(f), given, tangent) for f in (end, by_hand)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        grads = (
            jax.jit(jax.grad(lambda *a, f=f: (f(*a) ** 2).sum(), (0, 1, 2)))(*given)
            for f in (end, by_hand)
        )
        for a, b in zip(*grads, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_experts_have_no_cache_of_a_prompt():
    cached = Denoiser(apply, Flow(), "flow", text_kv=lambda params, text: TextKV(text, text))
    assert isinstance(cached.cache_text(network(1.0), COND).text, TextKV)
    assert cached.cache_text(TWO, COND) is COND
