import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import SHAPE, WORLDS, D, World, all_worlds, gaussian_params, make_batch

from gadjax.objectives import Denoising

B = 4096


def pictures(params, batch):
    """Samples of the gaussian, shifted by the batch's text."""
    mean, basis, variance = (np.asarray(params[k], float) for k in ("mean", "basis", "variance"))
    drawn = np.random.default_rng(5).normal(size=(B, D)) * variance**0.5
    x0 = mean + np.asarray(batch.cond.text[:, 0]) + drawn @ basis.T
    return batch._replace(x0=jnp.asarray(x0.reshape(B, *SHAPE), jnp.float32))


@all_worlds
def test_least_at_the_posterior_mean(world):
    """Networks of the form of the exact posterior mean, with right or wrong parameters."""
    right, term = gaussian_params(), Denoising()
    batch = pictures(right, make_batch(B))

    @jax.jit
    def run(params):
        return term(world.context(term, batch, params, None, None))[0]

    least = np.asarray(run(right), float)
    for wrong in (
        right | {"mean": right["mean"] + 0.2},
        right | {"variance": 1.5 * right["variance"]},
        right | {"variance": right["variance"] / 1.5},
        right | {"basis": jnp.roll(right["basis"], 1, axis=1)},
    ):
        more = np.asarray(run(wrong), float) - least
        assert more.mean() > 4 * more.std() / B**0.5

    @jax.jit
    def slopes(params):
        def one(params, part):
            return term(world.context(term, part, params, None, None))[0].mean()

        parts = jax.tree.map(lambda v: v.reshape(64, -1, *v.shape[1:]), batch)
        return jax.lax.map(lambda part: jax.grad(one)(params, part), parts)

    actual = jax.device_get(slopes(right))
    for name in ("mean", "variance"):
        slope = actual[name].astype(float)
        assert np.all(np.abs(slope.mean(0)) < 4.5 * slope.std(0) / 8)


@all_worlds
def test_times_are_the_schedules_grid(world):
    """Every integer time from the first noised one to the last, with the target of its x_t."""
    asked = []

    def apply(params, x, t, cond):
        jax.debug.callback(lambda t: asked.append(np.asarray(t)), t)
        return params * x

    term = Denoising()
    batch = pictures(gaussian_params(), make_batch(B))
    watched = type(world)(world.schedule, world.kind, world.times)
    object.__setattr__(watched, "denoiser", type(world.denoiser)(apply, world.schedule, world.kind))
    jax.jit(lambda p: term(watched.context(term, batch, p, None, None))[0])(1.0).block_until_ready()
    jax.effects_barrier()
    times = np.concatenate(asked)
    assert np.all(times == np.floor(times)) and len(np.unique(times)) > 950
    first = world.schedule.clean + 1
    assert times.min() >= first and times.max() <= world.schedule.last
    assert abs(times.mean() - (first + world.schedule.last) / 2) < 4 * 289 / B**0.5


def test_balance_lies_between_the_eps_loss_and_the_v_loss():
    """(1 + b) / (alpha^2 + b); an error of eps over alpha is the error of v."""
    world = WORLDS["ddpm"]
    as_v = World(world.schedule, "v", world.times)
    params = gaussian_params(3)
    batch = pictures(params, make_batch(B))

    @jax.jit
    def run(params):
        def losses(world, balance):
            term = Denoising(balance)
            return term(world.context(term, batch, params, None, None))

        context = world.context(Denoising(), batch, params, None, None)
        alpha, _ = world.schedule.alpha_sigma(jnp.floor(context.uniform("t") * 1000))
        actual = [losses(world, b) for b in (None, 0.0, 0.3)]
        return actual, losses(as_v, None)[0], alpha

    (plain, balanced, between), v, alpha = jax.device_get(run(params))
    eps, metrics = plain
    assert metrics == {}
    np.testing.assert_allclose(balanced[0], v, rtol=1e-3, atol=1e-3 * v.mean())
    np.testing.assert_allclose(between[0], eps * 1.3 / (alpha**2 + 0.3), rtol=1e-4)
    assert float(between[1]["unweighted"]) == pytest.approx(eps.mean(), rel=1e-5)
