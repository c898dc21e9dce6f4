from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    GUIDANCE,
    SHAPE,
    all_worlds,
    gaussian_params,
    make_batch,
    mixture_params,
)
from smooth_world import WORLDS, smooth_params, trig_velocity

from gadjax.analytic.bench import Bench
from gadjax.analytic.teachers import Mixture
from gadjax.errors import InputError
from gadjax.objectives import DMD, GAD, RCM, TERMS, build
from gadjax.objectives.consistency import Velocities, velocities, velocity_and_update
from gadjax.objectives.rcm import regularised_update
from gadjax.objectives.time_laws import log_normal_times

sg = jax.lax.stop_gradient
SAMPLES = 6
WORLD = WORLDS["flow"]


def released(context, student, teacher, r):
    """`_student_scm_step` of the authors' code, in TrigFlow with sigma_data 1."""
    batch = context.batch
    net = trig_velocity(WORLD, student, batch.cond)
    halves = [trig_velocity(WORLD, teacher, c) for c in (batch.cond, batch.null)]
    t = log_normal_times(context, 0.7, 1.6) / 1000
    a = jnp.arctan2(t, 1 - t)
    cos, sin = jnp.cos(a)[:, None, None, None], jnp.sin(a)[:, None, None, None]
    x = cos * batch.x0 + sin * batch.noise
    cond, null = (half(x, a) for half in halves)
    real = sg(null + GUIDANCE * (cond - null))
    value, rate = jax.jvp(net, (x, a), (cos * sin * real, (cos * sin)[:, 0, 0, 0]))
    rate = sg(rate)
    g = -cos * jnp.sqrt(1 - r**2 * sin**2) * (sg(value) - real) - (r * cos * sin * x + rate)
    g = g / (jnp.sqrt((g**2).sum((1, 2, 3), keepdims=True)) + 0.1)
    return 100 * ((value - sg(value) - g) ** 2).sum((1, 2, 3)) / x[0].size


@pytest.mark.parametrize("warmup,step", [(0, 0), (8, 2)], ids=["full", "warm-up"])
def test_loss_and_gradient_are_those_of_the_released_code(warmup, step):
    term = RCM(warmup=warmup)
    with jax.enable_x64(True):
        pictures = np.random.default_rng(5).normal(size=(SAMPLES, *SHAPE))
        batch = make_batch(SAMPLES, dtype=float)._replace(x0=jnp.asarray(pictures))
        nets = smooth_params(0.3, dtype=float), mixture_params(dtype=float)

        def context(student, teacher):
            return replace(WORLD.context(term, batch, student, None, teacher), step=step)

        def ours(*nets):
            return term(context(*nets))[0]

        def theirs(*nets):
            return released(context(*nets), *nets, step / warmup if warmup else 1.0)

        @jax.jit
        def run(*nets):
            def both(f):
                return f(*nets), jax.grad(lambda *nets: f(*nets).mean(), (0, 1))(*nets)

            return both(ours), both(theirs)

        (value, (slope, held)), (formula, (formula_slope, _)) = jax.device_get(run(*nets))
    np.testing.assert_allclose(value, formula, rtol=1e-10)
    for name in slope:
        size = np.abs(formula_slope[name]).max()
        assert size > 1e-3
        np.testing.assert_allclose(slope[name], formula_slope[name], atol=1e-10 * size)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(held))  # stop-gradiented


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_without_a_warm_up_the_update_is_that_of_scm(kind):
    world, batch = WORLDS[kind], make_batch(32)
    t = jnp.linspace(world.schedule.clean + 1, world.times[0], 32)

    @jax.jit
    def run(student, teacher):
        def predict(x, t):
            return world.denoiser(student, x, t, batch.cond)

        real = world.denoiser(teacher, batch.noise, t, batch.cond)
        given = predict, real, world.schedule, batch.noise, t
        return regularised_update(velocities(*given), batch.noise, 1.0), velocity_and_update(*given)

    actual, (_, expected) = run(smooth_params(0.3), mixture_params())
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_the_warm_up_is_not_on_the_tangent():
    x = jnp.ones((1, *SHAPE))
    pair = Velocities(2 * x, x, 3 * x, jnp.array([0.6]), jnp.array([0.8]))
    g = regularised_update(pair, x, 0.0)
    np.testing.assert_allclose(g, -0.6 - 3, rtol=1e-6)


@pytest.mark.parametrize("kind", ["eps", "x0"])
def test_on_a_diffusion_teacher_the_loss_is_of_the_networks_output(kind):
    """In float64: of the raw output, and of that which has F + g / (|g| + 0.1) at the same x."""
    world, term = WORLDS[kind], RCM()

    def by_hand(context, student, teacher):
        batch = context.batch
        t = log_normal_times(context, 0.7, 1.6)
        alpha, sigma = (v[:, None, None, None] for v in world.schedule.alpha_sigma(t))
        x, length = alpha * batch.x0 + sigma * batch.noise, jnp.sqrt(alpha**2 + sigma**2)
        cos, sin, x_a = alpha / length, sigma / length, x / length

        def network(x, t):
            return world.denoiser(student, x, t, batch.cond)

        pair = velocities(network, context.teacher(x, t), world.schedule, x, t)
        g = -(cos**2) * (pair.student - pair.teacher) - (cos * sin * x_a + pair.rate)
        goal = pair.student + g / (jnp.sqrt((g**2).sum((1, 2, 3), keepdims=True)) + 0.1)
        goal = sin * x_a + cos * goal if kind == "eps" else cos * x_a - sin * goal
        raw = world.denoiser.raw(student, x, t, batch.cond)
        return 100 * ((raw - sg(goal)) ** 2).mean((1, 2, 3))

    with jax.enable_x64(True):
        pictures = np.random.default_rng(5).normal(size=(SAMPLES, *SHAPE))
        batch = make_batch(SAMPLES, dtype=float)._replace(x0=jnp.asarray(pictures))
        teacher = mixture_params(dtype=float)

        @jax.jit
        def run(student):
            def both(f):
                return f(student), jax.grad(lambda student: f(student).mean())(student)

            def context(student):
                return world.context(term, batch, student, None, teacher)

            return both(lambda s: term(context(s))[0]), both(
                lambda s: by_hand(context(s), s, teacher)
            )

        actual, expected = jax.device_get(run(smooth_params(0.3, dtype=float)))
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * np.abs(b).max())
        assert np.abs(b).max() > 1e-3


@all_worlds
def test_log_ratios_are_normal(world):
    samples, term = 4096, RCM(mean=0.3, std=0.5)
    batch = make_batch(samples)
    context = world.context(RCM(images=False), batch, None, None, gaussian_params())
    t = np.asarray(jax.jit(lambda: log_normal_times(context, term.mean, term.std))(), float)
    alpha, sigma = world.schedule.alpha_sigma(t)
    normal = np.sort((np.log(sigma / alpha) - 0.3) / 0.5)
    expected = np.asarray(jax.scipy.special.ndtri((np.arange(samples) + 0.5) / samples))
    assert np.abs(normal - expected)[100:-100].max() < 0.12


@pytest.mark.slow
def test_it_learns_the_teachers_map_in_one_step():
    bench = Bench(Mixture.ring(), "flow", 1)
    start = bench.measure(bench.draw, bench.init(jax.random.key(0)))
    result = bench.fit(1.0 * RCM(), 1000)
    assert result.transport_cost < 0.5 * start.transport_cost


def test_it_is_summed_with_dmd_on_fresh_noise():
    config = {"rcm": {}, "dmd": {"weight": 2.0}, "gad": {"weight": 0.3, "end": "clean"}}
    total = build(config, TERMS, (899.0, 449.0), "fresh_noise")
    assert total.needs.critic and total.needs.images and total.needs.jvp
    assert not RCM(images=False).needs.images and (RCM() + DMD() + GAD()).needs.jvp


@pytest.mark.parametrize(
    "options,message",
    [
        ({"steps": 0}, "objective.rcm.steps: found 0; expected 1 or more"),
        ({"warmup": -1}, "objective.rcm.warmup: found -1; expected 0 or more"),
        ({"std": 0.0}, "objective.rcm.std: found 0.0; expected more than 0"),
        ({"mean": float("inf")}, "objective.rcm.mean: found inf; expected a number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        RCM(**options)
