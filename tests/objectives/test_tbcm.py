from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import GUIDANCE, gaussian_params, make_batch, mixture_params
from smooth_world import WORLDS, smooth_params, trig_velocity

from gadjax.analytic.bench import Bench
from gadjax.analytic.teachers import Mixture
from gadjax.errors import InputError
from gadjax.objectives import GAD, TBCM, Anchor, Consistency
from gadjax.objectives.tbcm import merge_points

sg = jax.lax.stop_gradient
SAMPLES = 6
WORLD = WORLDS["flow"]


def by_hand(context, student, teacher, points, ramp):
    """The released script's loop, in TrigFlow: a route, and sCM's g at all of it but the start."""
    batch = context.batch
    net = trig_velocity(WORLD, student, batch.cond)
    halves = [trig_velocity(WORLD, teacher, c) for c in (batch.cond, batch.null)]
    last = np.pi / 2
    first = np.arctan2(0.001, 0.999)
    u = [context.uniform(f"angle/{k}") for k in range(points)]
    route = [jnp.full(SAMPLES, last)]
    route += [first + (k + u[k]) / points * (last - first) for k in range(points)][::-1]
    x, losses, before, real = batch.noise, [], route[0], 0.0
    for number, a in enumerate(route):
        # The times of a grid of unit steps are linear between its points; so are these angles.
        knots = np.arange(1.0, 1001)
        table = np.arctan2(knots / 1000, 1 - knots / 1000)
        t = jnp.interp(a, table, knots)
        a = jnp.arctan2(t / 1000, 1 - t / 1000)
        cos, sin = jnp.cos(a)[:, None, None, None], jnp.sin(a)[:, None, None, None]
        turn = (before - a)[:, None, None, None]
        x = jnp.cos(turn) * x - jnp.sin(turn) * real
        cond, null = (half(x, a) for half in halves)
        real, before = null + GUIDANCE * (cond - null), a
        if number == 0:
            continue
        steps = cos * sin * real, jnp.cos(a) * jnp.sin(a)
        value, rate = jax.jvp(net, sg((x, a)), sg(steps))
        g = sg(-(cos**2) * (value - real) - ramp * (cos * sin * x + rate))
        g = g / (jnp.sqrt((g**2).mean((1, 2, 3), keepdims=True)) + 0.1)
        losses.append(((value - sg(value) - g) ** 2).mean((1, 2, 3)))
    return sum(losses) / points


def test_loss_and_gradient_are_those_of_the_released_loop():
    term, step, ramp = TBCM(points=3, warmup=8), 2, 2 / 8
    with jax.enable_x64(True):
        batch = make_batch(SAMPLES, dtype=float)
        nets = smooth_params(0.3, dtype=float), mixture_params(dtype=float)

        def context(student, teacher):
            return replace(WORLD.context(term, batch, student, None, teacher), step=step)

        def ours(*nets):
            return term(context(*nets))[0]

        def theirs(*nets):
            return by_hand(context(*nets), *nets, term.points, ramp)

        @jax.jit
        def run(*nets):
            def both(f):
                return f(*nets), jax.grad(lambda *nets: f(*nets).mean(), (0, 1))(*nets)

            return both(ours), both(theirs)

        actual, expected = jax.device_get(run(*nets))
    (value, (slope, held)), (formula, (formula_slope, _)) = actual, expected
    np.testing.assert_allclose(value, formula, rtol=1e-10)
    for name in slope:
        size = np.abs(formula_slope[name]).max()
        assert size > 1e-4
        np.testing.assert_allclose(slope[name], formula_slope[name], atol=1e-10 * size)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(held))  # stop-gradiented


def test_each_point_is_in_its_part_of_the_angle_and_on_the_teachers_steps():
    samples, term = 2048, TBCM(points=4)
    batch = make_batch(samples)
    context = WORLD.context(term, batch, smooth_params(), None, gaussian_params())
    t_NB, x, real = jax.jit(lambda: term.trajectory(context))()
    angles = np.arctan2(*(np.asarray(v, float) for v in WORLD.schedule.alpha_sigma(t_NB)[::-1]))
    low, high = np.arctan2(0.001, 0.999), np.pi / 2
    share = (angles - low) / (high - low) * 4
    for k, row in zip((3, 2, 1, 0), np.sort(share, 1), strict=True):
        assert row[0] > k - 1e-3 and row[-1] < k + 1 + 1e-3
        assert np.abs(row - k - (np.arange(samples) + 0.5) / samples).max() < 1.95 / samples**0.5
    assert abs(np.corrcoef(share[0], share[1])[0, 1]) < 0.1
    # x_{i+1} is the Euler step from x_i with the prediction there.
    t = np.asarray(t_NB)[..., None, None, None] / 1000
    ahead = (1 - t[1:]) * np.asarray(real.x0[:-1]) + t[1:] * np.asarray(real.eps[:-1])
    np.testing.assert_allclose(np.asarray(x[1:]), ahead, atol=1e-5)


def test_the_teacher_is_evaluated_once_a_point_and_once_at_the_start():
    calls, term = [], TBCM(points=5)

    def teacher(x, t):
        jax.debug.callback(lambda t: calls.append(t), t, ordered=True)
        return WORLD.denoiser(gaussian_params(), x, t, batch.cond)

    batch = make_batch(2)
    context = WORLD.context(term, batch, smooth_params(), None, gaussian_params())
    loss_B, _ = jax.jit(lambda: term(replace(context, teacher=teacher)))()
    jax.block_until_ready(loss_B)
    jax.effects_barrier()
    assert len(calls) == 6 and np.all(calls[0] == 1000) and np.all(np.diff(calls, axis=0) < 0)
    assert loss_B.shape == (2,) and loss_B.dtype == jnp.float32


def test_points_of_a_sample_stay_together():
    x = np.arange(6).reshape(3, 2)  # 3 points of 2 samples
    np.testing.assert_array_equal(merge_points(x), [0, 2, 4, 1, 3, 5])


@pytest.mark.slow
def test_it_learns_the_teachers_map_in_one_step():
    bench = Bench(Mixture.ring(), "flow", 1)
    start = bench.measure(bench.draw, bench.init(jax.random.key(0)))
    result = bench.fit(TBCM(points=4), 500)
    assert result.transport_cost < 0.5 * start.transport_cost


def test_it_combines_with_gad_an_anchor_and_another_consistency_loss():
    total = TBCM() + Consistency() + 0.3 * GAD() + 0.05 * Anchor()
    total.check((999.0, 500.0))
    assert total.names[0] == "tbcm" and not total.needs.images


@pytest.mark.parametrize(
    "options,message",
    [
        ({"points": 0}, "objective.tbcm.points: found 0; expected 1 or more"),
        ({"warmup": -1}, "objective.tbcm.warmup: found -1; expected 0 or more"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        TBCM(**options)
