from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    GUIDANCE,
    SHAPE,
    gaussian_params,
    guided_text,
    make_batch,
    mixture_params,
)
from smooth_world import WORLDS, Smooth, smooth_params

from gadjax.analytic.bench import Bench
from gadjax.analytic.teachers import Mixture
from gadjax.diffusion.schedules import Flow
from gadjax.errors import InputError
from gadjax.objectives import GAD, TERMS, Anchor, MeanFlow, build

sg = jax.lax.stop_gradient
SAMPLES = 8
WORLD = Smooth(Flow(), "flow", (1000.0, 600.0, 0.0))


def released(context, student, teacher, term, ramp):
    """The authors' loss, of t and r from 0 to 1, with the teacher's velocity as v."""
    batch = context.batch
    ends = jnp.array([[1.0, 0.6], [0.6, 0.0]])[context.step_B]
    r = ends[:, 1]
    t = r + (ends[:, 0] - r) * (1 - context.uniform("t"))

    def velocity(params, z, t, cond):
        return WORLD.denoiser.raw(params, z, 1000 * t, cond)

    def wide(v):
        return v[:, None, None, None]

    z = (1 - wide(t)) * batch.x0 + wide(t) * batch.noise
    cond, null = (velocity(teacher, z, t, c) for c in (batch.cond, batch.null))
    v = sg(null + GUIDANCE * (cond - null))
    one = jnp.ones_like(t)
    u, dudt = jax.jvp(lambda z, t: velocity(student, z, t, batch.cond), (z, t), (v, one))
    target = sg(v - wide(t - r) * ramp * dudt)
    loss = ((u - target) ** 2).mean((1, 2, 3))
    return loss / sg(loss + 1e-3) ** term.power


@pytest.mark.parametrize(
    "options,step",
    [({"power": 1.0}, 0), ({"power": 0.5, "warmup": 8}, 2)],
    ids=["plain", "options"],
)
def test_loss_and_gradient_are_those_of_the_released_code(options, step):
    term = MeanFlow(**options)
    ramp = step / term.warmup if term.warmup else 1
    with jax.enable_x64(True):
        pictures = np.random.default_rng(5).normal(size=(SAMPLES, *SHAPE))
        batch = make_batch(SAMPLES, dtype=float)._replace(x0=jnp.asarray(pictures))
        nets = smooth_params(0.3, dtype=float), mixture_params(dtype=float)

        def context(student, teacher):
            return replace(WORLD.context(term, batch, student, None, teacher), step=step)

        @jax.jit
        def run(*nets):
            def both(f):
                return f(*nets), jax.grad(lambda *nets: f(*nets).mean(), (0, 1))(*nets)

            ours = both(lambda *nets: term(context(*nets))[0])
            return ours, both(lambda *nets: released(context(*nets), *nets, term, ramp))

        (value, (slope, held)), (formula, (formula_slope, _)) = jax.device_get(run(*nets))
    np.testing.assert_allclose(value, formula, rtol=1e-10)
    for name in slope:
        size = np.abs(formula_slope[name]).max()
        assert size > 1e-3
        np.testing.assert_allclose(slope[name], formula_slope[name], atol=1e-10 * size)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(held))  # stop-gradiented


def test_the_teachers_flow_map_is_the_fixed_point_of_one_step():
    """Under guidance a gaussian is a gaussian; u = (x_t - x_0) / t of its exact map."""
    world, term = WORLDS["flow"], MeanFlow(images=False)
    with jax.enable_x64(True):
        batch, teacher = make_batch(32, dtype=float), gaussian_params(dtype=float)
        mean = teacher["mean"] + jnp.asarray(guided_text(batch))
        student = {"mean": mean, "slope": teacher["variance"], "axes": teacher["basis"]}

        @jax.jit
        def run(student):
            return term(world.context(term, batch, student, None, teacher))[0]

        wrong = student | {"slope": 1.1 * teacher["variance"]}
        right, wrong = jax.device_get((run(student), run(wrong)))
    assert right.max() < 1e-16 and wrong.mean() > 1e-4


def test_times_are_uniform_in_the_students_steps():
    samples, calls = 4096, []
    batch = make_batch(samples)._replace(x0=jnp.zeros((samples, *SHAPE)))
    nets = FLOW_WORLD.student_params(), None, mixture_params()
    context = FLOW_WORLD.context(MeanFlow(), batch, *nets)

    def teacher(x, t):
        calls.append(t)
        return context.teacher(x, t)

    @jax.jit
    def run():
        MeanFlow()(replace(context, teacher=teacher))
        return calls[0]

    t, step = np.asarray(run()), np.asarray(context.step_B)
    for k, (high, low) in enumerate(zip(FLOW_WORLD.times[:-1], FLOW_WORLD.times[1:], strict=True)):
        share = np.sort((t[step == k] - low) / (high - low))
        count = len(share)
        assert count == samples / 4 and share[0] > 0 and share[-1] <= 1
        assert np.abs(share - (np.arange(count) + 0.5) / count).max() < 1.95 / count**0.5


@pytest.mark.slow
@pytest.mark.parametrize("steps,power", [(1, 0.0), (4, 1.0)])
def test_it_learns_the_teachers_map_in_its_steps(steps, power):
    bench = Bench(Mixture.ring(), "flow", steps)
    start = bench.measure(bench.draw, bench.init(jax.random.key(0)))
    result = bench.fit(MeanFlow(power=power), 1000)
    assert result.transport_cost < 0.5 * start.transport_cost


def test_it_combines_with_gad_and_an_anchor():
    total = build({"meanflow": {"images": False}, "gad": {}, "anchor": {}}, TERMS, (999.0, 500.0))
    assert total.needs.jvp and not total.needs.images
    assert (MeanFlow() + GAD() + Anchor()).needs.images


@pytest.mark.parametrize(
    "options,message",
    [
        ({"steps": 0}, "objective.meanflow.steps: found 0; expected 1 or more"),
        ({"warmup": -1}, "objective.meanflow.warmup: found -1; expected 0 or more"),
        ({"power": 1.5}, "objective.meanflow.power: found 1.5; expected a number from 0 to 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        MeanFlow(**options)


def test_teachers_that_are_no_flows_are_refused():
    (1.0 * MeanFlow()).check_denoiser(FLOW_WORLD.denoiser)
    with pytest.raises(InputError, match="objective.meanflow: found .* DDPM; expected a flow"):
        (1.0 * MeanFlow()).check_denoiser(DDPM_WORLD.denoiser)
