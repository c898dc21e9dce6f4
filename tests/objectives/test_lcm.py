from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    GUIDANCE,
    SHAPE,
    World,
    all_worlds,
    make_batch,
    mixture_params,
)
from diffusers import LCMScheduler

from gadjax.analytic.bench import Bench
from gadjax.analytic.teachers import Mixture
from gadjax.diffusion.schedules import DDPM, Flow
from gadjax.errors import InputError
from gadjax.objectives import GAD, LCM
from gadjax.objectives.lcm import boundary_scalings
from gadjax.training.context import Roles, make_context

SAMPLES = 12
WORLD = World(DDPM(), "eps", (999.0, 749.0, 499.0, 249.0, -1.0))


def released(world, term, context, student, target, teacher):
    """The diffusers script: 50 DDIM steps of 20, times 19 to 999, and w = guidance - 1."""
    batch = context.batch
    timesteps = np.arange(1, 51) * 20 - 1
    bar = np.asarray(world.schedule.alpha_sigma(np.arange(1000.0))[0]) ** 2
    before = np.array([bar[0], *bar[timesteps[:-1]]])
    index = 49 - jnp.floor(context.uniform("t") * 50).astype(int)
    start = jnp.asarray(timesteps)[index]
    end = jnp.maximum(start - 20, 0)

    def scalings(t):
        scaled = (t * 10.0)[:, None, None, None]
        return 0.5**2 / (scaled**2 + 0.5**2), scaled / (scaled**2 + 0.5**2) ** 0.5

    def eps_and_x0(params, x, t, cond):
        eps = world.denoiser.raw(params, x, t.astype(float), cond)
        level = jnp.asarray(bar)[t][:, None, None, None]
        return eps, (x - jnp.sqrt(1 - level) * eps) / jnp.sqrt(level)

    level = jnp.asarray(bar)[start][:, None, None, None]
    noisy = jnp.sqrt(level) * batch.x0 + jnp.sqrt(1 - level) * batch.noise
    c_skip, c_out = scalings(start)
    prediction = c_skip * noisy + c_out * eps_and_x0(student, noisy, start, batch.cond)[1]
    (cond_eps, cond_x0), (null_eps, null_x0) = (
        eps_and_x0(teacher, noisy, start, c) for c in (batch.cond, batch.null)
    )
    w = GUIDANCE - 1
    x0, eps = cond_x0 + w * (cond_x0 - null_x0), cond_eps + w * (cond_eps - null_eps)
    previous = jnp.asarray(before)[index][:, None, None, None]
    x_prev = jnp.sqrt(previous) * x0 + jnp.sqrt(1 - previous) * eps
    c_skip, c_out = scalings(end)
    goal = c_skip * x_prev + c_out * eps_and_x0(target, x_prev, end, batch.cond)[1]
    error = prediction - jax.lax.stop_gradient(goal)
    if term.huber:
        return (jnp.sqrt(error**2 + term.huber**2) - term.huber).mean((1, 2, 3))
    return (error**2).mean((1, 2, 3))


@pytest.mark.parametrize("options", [{"huber": 0.3}, {"huber": 0.0, "target": "student"}], ids=str)
def test_loss_and_gradient_are_those_of_the_released_script(options):
    term = LCM(**options)
    with jax.enable_x64(True):
        pictures = np.random.default_rng(5).normal(size=(SAMPLES, *SHAPE))
        batch = make_batch(SAMPLES, dtype=float)._replace(x0=jnp.asarray(pictures))
        student, ema = (WORLD.student_params(seed, bend=0.4, dtype=float) for seed in (1, 2))
        teacher = mixture_params(dtype=float)

        def context(student, ema, teacher):
            roles = Roles(student, teacher, ema=ema)
            return make_context(WORLD.step_spec(term), term.needs, roles, batch)

        def ours(*nets):
            return term(context(*nets))[0]

        def theirs(student, ema, teacher):
            target = ema if term.target == "ema" else student
            given = context(student, ema, teacher)
            return released(WORLD, term, given, student, target, teacher)

        @jax.jit
        def run(*nets):
            def both(f):
                return f(*nets), jax.grad(lambda *nets: f(*nets).mean(), (0, 1, 2))(*nets)

            return both(ours), both(theirs)

        actual, expected = jax.device_get(run(student, ema, teacher))
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    slope, *others = actual[1]
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(slope)) > 1e-3
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))  # stop-gradiented


def test_the_boundary_is_that_of_diffusers_scheduler():
    scheduler, times = LCMScheduler(), np.array([0, 1, 19, 499, 999])
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(int(t)) for t in times]
    actual = boundary_scalings(DDPM(), jnp.asarray(times, jnp.float32))
    np.testing.assert_allclose(np.stack(actual, 1), np.array(expected, float), rtol=1e-6, atol=1e-9)
    assert np.asarray(actual[0])[2] < 7e-6  # what a sampler leaves out at time 19
    assert np.stack(boundary_scalings(Flow(), jnp.array([1.0]))).ravel().tolist() == [1, 0]


@all_worlds
def test_times_are_on_the_grid_and_the_teacher_takes_one_step(world):
    term, samples, calls = LCM(skip=30), 4096, []
    batch = make_batch(samples)._replace(x0=jnp.zeros((samples, *SHAPE)))

    def apply(params, x, t, cond):
        calls.append(t)
        return world.apply(params, x, t, cond)

    @jax.jit
    def run():
        roles = Roles(world.student_params(), mixture_params(), ema=world.student_params())
        context = make_context(world.step_spec(term), term.needs, roles, batch)
        context = replace(context, denoiser=replace(world.denoiser, apply=apply))
        term(context)
        return jnp.stack(calls)

    r, t = np.asarray(run())  # of the target and of the student; the teacher's is another denoiser
    first, last = world.schedule.clean + 1, world.times[0]
    grid = np.arange(last, first, -30)
    np.testing.assert_array_equal(np.unique(t), grid[::-1])
    np.testing.assert_array_equal(r, np.maximum(t - 30, first))
    counts = np.unique(t, return_counts=True)[1]
    assert np.abs(counts / samples * len(grid) - 1).max() < 0.5


@pytest.mark.slow
def test_it_learns_the_teachers_map_in_one_step():
    bench = Bench(Mixture.ring(), "flow", 1)
    start = bench.measure(bench.draw, bench.init(jax.random.key(0)))
    result = bench.fit(LCM(huber=0.0), 1000)
    assert result.transport_cost < 0.5 * start.transport_cost


def test_it_combines_with_gad():
    total = LCM() + 0.3 * GAD(end="clean")
    total.check((899.0, 449.0), "fresh_noise")
    assert total.needs.ema and total.needs.images and total.needs.uses_teacher


@pytest.mark.parametrize(
    "options,message",
    [
        ({"target": "teacher"}, "objective.lcm.target: found 'teacher'; expected"),
        ({"skip": 0}, "objective.lcm.skip: found 0; expected 1 or more"),
        ({"huber": float("inf")}, "objective.lcm.huber: found inf; expected 0 or more"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        LCM(**options)


def test_a_teacher_with_embedded_guidance_is_refused():
    denoiser = replace(WORLD.denoiser, guidance_embedded=True)
    with pytest.raises(InputError, match="objective.lcm: found a teacher with embedded guidance"):
        (1.0 * LCM()).check_denoiser(denoiser)
