from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import DDPM_WORLD, FLOW_WORLD, GUIDANCE, make_batch, mixture_params
from formula_terms import Hand
from smooth_world import WORLDS, smooth_params

from gadjax.analytic.bench import Bench
from gadjax.analytic.teachers import Mixture
from gadjax.errors import InputError
from gadjax.objectives import BOOT, GAD, TERMS, build
from gadjax.objectives.boot import signal

sg = jax.lax.stop_gradient
all_worlds = pytest.mark.parametrize("kind", ["flow", "v"])


def by_hand(world, term, hand):
    """The step of the teacher's ODE in x, and the signal of where it ends."""
    z, schedule, context = hand.batch.noise, world.schedule, hand.context
    first, last = schedule.clean + 1, world.times[0]
    delta = (last - first) / term.points
    s = first + context.uniform("t") * (last - first - delta)
    end = jnp.full_like(s, last)

    def y(t):
        raw = world.denoiser.raw(hand.student, z, last + first - t, hand.batch.cond)
        alpha, sigma = hand.alpha_sigma(end)
        return z - raw if world.kind == "flow" else alpha * z - sigma * raw

    def teacher(x, t):
        return hand.guided(hand.teacher, x, t, GUIDANCE)

    (a, b), (c, d) = hand.alpha_sigma(s + delta), hand.alpha_sigma(s)
    x0, eps = teacher(a * y(s + delta) + b * z, s + delta)
    x_s = c * x0 + d * eps
    error = y(s) - sg((x_s - d * z) / c)
    edge = y(end) - sg(teacher(z, end).x0)
    step_B, edge_B = ((e**2).mean((1, 2, 3)) for e in (error, edge))
    return term.points**2 * step_B + term.boundary * edge_B


@all_worlds
def test_loss_and_gradient_are_those_of_a_step_of_the_ode(kind):
    world, term = WORLDS[kind], BOOT(points=7, boundary=0.3)
    samples = 8
    with jax.enable_x64(True):
        batch = make_batch(samples, dtype=float)
        student, teacher = smooth_params(0.3, dtype=float), mixture_params(dtype=float)

        def hand(*nets):
            context = world.context(term, batch, nets[0], None, nets[1])
            return Hand(world, context, nets[0], {}, nets[1])

        @jax.jit
        def run(*nets):
            def both(f):
                return f(*nets), jax.grad(lambda *nets: f(*nets).mean(), (0, 1))(*nets)

            ours = both(lambda *nets: term(hand(*nets).context)[0])
            return ours, both(lambda *nets: by_hand(world, term, hand(*nets)))

        actual, expected = jax.device_get(run(student, teacher))
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * max(1, np.abs(b).max()))
    slope, held = actual[1]
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(slope)) > 1e-3
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(held))  # stop-gradiented


@all_worlds
def test_the_signal_at_the_first_noised_time_is_the_students_one_step(kind):
    world, batch = WORLDS[kind], make_batch(4)
    total = BOOT() + GAD(end="clean")  # which needs the student's step
    context = world.context(total, batch, smooth_params(0.3), None, mixture_params())
    first = jnp.full(4, world.schedule.clean + 1)
    np.testing.assert_allclose(signal(context, first), context.student[0].x0, rtol=1e-5, atol=1e-5)


def test_times_are_uniform_and_the_teacher_is_asked_at_the_noise_too():
    calls, samples = [], 2048
    context = WORLDS["flow"].context(
        BOOT(points=10), make_batch(samples), smooth_params(0.3), None, mixture_params()
    )

    def teacher(x, t):
        calls.append(t)
        return context.teacher(x, t)

    @jax.jit
    def run():
        BOOT(points=10)(replace(context, teacher=teacher))
        return calls

    t, last = map(np.asarray, run())
    assert np.all(last == 1000) and t.min() >= 100.9 - 1e-3 and t.max() <= 1000
    share = np.sort((t - 100.9) / 899.1)
    assert np.abs(share - (np.arange(samples) + 0.5) / samples).max() < 1.95 / samples**0.5


@pytest.mark.slow
def test_it_learns_the_teachers_map():
    bench = Bench(Mixture.ring(), "flow", 1)
    start = bench.measure(bench.draw, bench.init(jax.random.key(0)))
    result = bench.fit(BOOT(), 1000)
    assert result.transport_cost < 0.1 * start.transport_cost


@pytest.mark.parametrize(
    "options,message",
    [
        ({"points": 1}, "objective.boot.points: found 1; expected 2 or more"),
        ({"boundary": 0.0}, "objective.boot.boundary: found 0.0; expected more than 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        BOOT(**options)


def test_students_of_several_steps_and_teachers_of_eps_are_refused():
    with pytest.raises(InputError, match="student.steps: found 4; expected 1 with objective.boot"):
        build({"boot": {}}, TERMS, FLOW_WORLD.times[:-1])
    total = build({"boot": {}, "gad": {"weight": 0.3}}, TERMS, (999.0,))
    total.check_denoiser(FLOW_WORLD.denoiser)
    with pytest.raises(InputError, match="objective.boot: found a teacher that predicts eps"):
        total.check_denoiser(DDPM_WORLD.denoiser)
