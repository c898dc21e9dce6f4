from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    GUIDANCE,
    SHAPE,
    flow_first,
    gaussian_params,
    make_batch,
    mixture_params,
    sgd,
)
from tiny_run import config_file

from gadjax.analytic.bench import Bench
from gadjax.analytic.teachers import Mixture
from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.objectives import GAD, Anchor, ConsistencyDistillation
from gadjax.training.context import Roles, make_context
from gadjax.training.state import create_state
from gadjax.training.steps import student_step

sg = jax.lax.stop_gradient
SAMPLES = 8


def pictures(dtype=float):
    return jnp.asarray(np.random.default_rng(5).normal(size=(SAMPLES, *SHAPE)), dtype)


def by_hand(world, term, context, student, target, teacher):
    """The paper's equation 7 with one DDIM step of the guided teacher."""
    batch, schedule = context.batch, world.schedule
    span = (world.times[0] - schedule.clean) / term.points
    r = schedule.clean + jnp.floor(context.uniform("t") * term.points) * span
    (a, s), (b, q) = (
        [v[:, None, None, None] for v in schedule.alpha_sigma(t)] for t in (r + span, r)
    )
    x_t = a * batch.x0 + s * batch.noise
    cond, null = (world.denoiser(teacher, x_t, r + span, c) for c in (batch.cond, batch.null))
    x0, eps = (n + GUIDANCE * (c - n) for c, n in zip(cond, null, strict=True))
    x_r = b * x0 + q * eps
    clean = (r == schedule.clean)[:, None, None, None]
    x0_r = world.denoiser(target, x_r, jnp.where(r == schedule.clean, 500.0, r), batch.cond).x0
    error = world.denoiser(student, x_t, r + span, batch.cond).x0 - sg(jnp.where(clean, x_r, x0_r))
    if term.huber:
        return (jnp.sqrt(error**2 + term.huber**2) - term.huber).mean((1, 2, 3))
    return (error**2).mean((1, 2, 3))


@pytest.mark.parametrize(
    "options", [{}, {"huber": 0.3, "target": "student", "points": 7}], ids=["ema", "student"]
)
@flow_first
def test_loss_and_gradient_are_those_of_the_formula(world, options):
    term = ConsistencyDistillation(**options)
    with jax.enable_x64(True):
        batch = make_batch(SAMPLES, dtype=float)._replace(x0=pictures())
        student, ema = (world.student_params(seed, bend=0.4, dtype=float) for seed in (1, 2))
        teacher = mixture_params(dtype=float)

        def ours(student, ema, teacher):
            roles = Roles(student, teacher, ema=ema)
            return term(make_context(world.step_spec(term), term.needs, roles, batch))[0]

        def theirs(student, ema, teacher):
            roles = Roles(student, teacher, ema=ema)
            context = make_context(world.step_spec(term), term.needs, roles, batch)
            target = ema if term.target == "ema" else student
            return by_hand(world, term, context, student, target, teacher)

        @jax.jit
        def run(*nets):
            def both(f):
                return f(*nets), jax.grad(lambda *nets: f(*nets).mean(), (0, 1, 2))(*nets)

            return both(ours), both(theirs)

        actual, expected = jax.device_get(run(student, ema, teacher))
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
    slope, *others = actual[1]
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(slope)) > 1e-3
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))  # stop-gradiented


@pytest.mark.parametrize("world", [DDPM_WORLD, FLOW_WORLD], ids=["ddpm", "flow"])
def test_the_first_point_s_target_is_x_itself(world):
    """With two points: at the clean end the target is the teacher's own x0."""
    term = ConsistencyDistillation(points=2)
    with jax.enable_x64(True):
        batch = make_batch(SAMPLES, dtype=float)._replace(x0=pictures())
        student, teacher = world.student_params(dtype=float), gaussian_params(dtype=float)
        roles = Roles(student, teacher, ema=student)
        context = make_context(world.step_spec(term), term.needs, roles, batch)
        last = np.asarray(context.uniform("t")) < 0.5
        t = jnp.full(SAMPLES, (world.times[0] + world.schedule.clean) / 2)
        alpha, sigma = (v[:, None, None, None] for v in world.schedule.alpha_sigma(t))
        x_t = alpha * batch.x0 + sigma * batch.noise
        error = world.denoiser(student, x_t, t, batch.cond).x0 - context.teacher(x_t, t).x0
        expected = np.asarray((error**2).mean((1, 2, 3)))
        actual = np.asarray(term(context)[0])
    assert 0 < last.sum() < SAMPLES
    np.testing.assert_allclose(actual[last], expected[last], rtol=1e-9)


def test_an_update_evaluates_the_average(monkeypatch):
    """Of two states that differ in their average alone, the losses differ."""
    world, term = FLOW_WORLD, ConsistencyDistillation()
    step_spec = world.step_spec(term, optimizers=sgd())
    batch = make_batch(SAMPLES)._replace(x0=pictures(jnp.float32))
    state = create_state({"student": world.student_params()}, step_spec.optimizers)
    other, nets = state._replace(ema=world.student_params(seed=7)), {"teacher": mixture_params()}
    step = jax.jit(partial(student_step, step_spec))
    losses = [float(step(s, nets, batch)[1]["student/loss"]) for s in (state, other)]
    assert losses[0] != losses[1]
    same = replace(step_spec, objective=ConsistencyDistillation(target="student"))
    step = jax.jit(partial(student_step, same))
    losses = [float(step(s, nets, batch)[1]["student/loss"]) for s in (state, other)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_it_learns_the_teacher_s_map_in_one_step():
    """On the ring of eight modes: the map of noise to sample, as regression learns it."""
    bench = Bench(Mixture.ring(), "flow", 1)
    start = bench.measure(bench.draw, bench.init(jax.random.key(0)))
    result = bench.fit(ConsistencyDistillation(points=32), 1000)
    assert result.transport_cost < 0.5 * start.transport_cost


def test_it_combines_with_gad_and_an_anchor():
    total = ConsistencyDistillation() + 0.3 * GAD(end="clean") + 0.05 * Anchor()
    total.check(FLOW_WORLD.times[:-1], "fresh_noise")
    assert total.needs.ema and total.needs.images


@pytest.mark.parametrize(
    "options, words",
    [
        ({"target": "teacher"}, "objective.cd.target: found 'teacher'; expected"),
        ({"points": 1}, "objective.cd.points: found 1; expected 2 or more"),
        ({"huber": -0.1}, "objective.cd.huber: found -0.1; expected 0 or more"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(InputError, match=words):
        ConsistencyDistillation(**options)


def test_an_average_in_the_hosts_memory_is_refused(tiny_pipeline, tmp_path, capsys):
    config = config_file(
        tmp_path / "config.py",
        teacher=str(tiny_pipeline),
        objective={"cd": {}},
        offload=("ema",),
        data={"world": "gadjax.worlds.shapes"},
    )
    assert main(["train", "--config", str(config), "--workdir", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert "offload: found 'ema' and a loss that evaluates the average" in line
    assert line.count("\n") == 1
