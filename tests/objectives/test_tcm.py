from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, flow_first, make_batch, one_step
from formula_terms import pictures
from tiny_run import config_file

from gadjax.errors import InputError
from gadjax.objectives import TCM, TERMS, build
from gadjax.objectives.time_laws import times_at_ratio
from gadjax.training.config import read_config
from gadjax.training.context import Roles, make_context
from gadjax.training.setup import prepare

sg = jax.lax.stop_gradient
SAMPLES, AT = 64, 0.4
TERM = TCM(transition=AT, mean=0.2, std=1.5, factor=4.0)


def context_of(world, term, student, frozen, batch):
    roles = Roles(student, networks={"tcm/stage1": frozen})
    return make_context(world.step_spec(term), term.needs, roles, batch)


def drawn_ratios(term, context):
    """u_t, by the inverse of the normal's upper part, and the samples at the boundary."""
    normal = jax.scipy.stats.norm
    tail = normal.sf((np.log(AT) - term.mean) / term.std)
    u = jnp.exp(term.mean + term.std * -normal.ppf(tail * (1 - context.uniform("angle"))))
    held = context.uniform("boundary") < term.share
    return jnp.where(held, AT, u), held


def by_hand(world, term, context, student, frozen):
    """w |S(x_t) - target| / (u_t - u_r), the target by where u_r is."""
    batch, schedule = context.batch, world.schedule

    def level(t):
        alpha, sigma = schedule.alpha_sigma(t)
        return sigma / alpha

    def network(params, t):
        alpha, sigma = (v[:, None, None, None] for v in schedule.alpha_sigma(t))
        return world.denoiser(params, alpha * batch.x0 + sigma * batch.noise, t, batch.cond).x0

    drawn, held = drawn_ratios(term, context)
    t = times_at_ratio(context, drawn)
    u = level(t)
    lower = u * jnp.maximum(1 - (1 + 8 / (1 + jnp.exp(u))) / term.factor, 0)
    r = times_at_ratio(context, lower)
    clean = lower < level(jnp.float64(schedule.clean + 1))
    target = jnp.where(
        (level(r) < AT)[:, None, None, None], network(frozen, r), network(student, r)
    )
    target = jnp.where(clean[:, None, None, None], batch.x0, target)
    square = ((network(student, t) - sg(target)) ** 2).mean((1, 2, 3))
    distance = jnp.sqrt(square + term.huber**2) - term.huber
    weight = jnp.where(held, term.boundary / term.share, 1 / (1 - term.share))
    kinds = held, ~held & (level(r) < AT), ~held & (level(r) >= AT)
    return weight * distance / (u - jnp.where(clean, 0, level(r))), kinds


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    """In float64, with samples at the boundary, and targets of both networks."""
    with jax.enable_x64(True):
        batch = make_batch(SAMPLES, dtype=float)._replace(x0=pictures(float, SAMPLES))
        nets = [world.student_params(seed, bend=0.4, dtype=float) for seed in (1, 2)]

        def ours(*nets):
            return TERM(context_of(world, TERM, *nets, batch))[0].mean(), ()

        def theirs(student, frozen):
            context = context_of(world, TERM, student, frozen, batch)
            loss, kinds = by_hand(world, TERM, context, student, frozen)
            return loss.mean(), kinds

        @jax.jit
        def run(*nets):
            return [jax.value_and_grad(f, (0, 1), has_aux=True)(*nets) for f in (ours, theirs)]

        (actual, expected) = jax.device_get(run(*nets))
    kinds = expected[0][1]
    assert all(kind.sum() > 3 for kind in kinds) and sum(kinds).all()
    (value, (slope, frozen)), (right, (slopes, _)) = (
        (value, gradients) for (value, _), gradients in (actual, expected)
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
    pairs = zip(jax.tree.leaves((value, slope)), jax.tree.leaves((right, slopes)), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * np.abs(b).max())
    assert sum(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(slopes)) > 3


def test_times_are_a_truncated_log_normal_and_a_quarter_at_the_boundary():
    samples, world = 4096, one_step(FLOW_WORLD)
    term = TCM(mean=0.0, std=1.0)

    @jax.jit
    def run():
        context = context_of(world, term, world.student_params(), None, make_batch(samples))
        return term.truncated_ratio(context), context.uniform("boundary") < term.share

    u, held = jax.device_get(run())
    assert u.min() >= 2 * (1 - 1e-5) and abs(held.mean() - 0.25) < 4 * 0.44 / samples**0.5
    tail = jax.scipy.stats.norm.sf(np.log(np.sort(u))) / jax.scipy.stats.norm.sf(np.log(2))
    ranks = 1 - (np.arange(samples) + 0.5) / samples
    assert np.abs(np.asarray(tail) - ranks).max() < 1.95 / samples**0.5


def test_a_student_that_is_constant_is_consistent_only_with_a_constant_stage_1():
    world, batch = one_step(FLOW_WORLD), make_batch(SAMPLES, text_scale=0.0)
    batch, student = batch._replace(x0=pictures(samples=SAMPLES)), world.student_params()
    constant = jax.tree.map(jnp.zeros_like, student)

    @jax.jit
    def run(params, frozen):
        term = replace(TERM, factor=256.0)  # no target is x0 itself
        return term(context_of(world, term, params, frozen, batch))[0].mean()

    assert float(run(constant, constant)) < 1e-8 and float(run(constant, student)) > 0.01


@pytest.mark.parametrize(
    "options,message",
    [
        ({"transition": 0.0}, "objective.tcm.transition: found 0.0; expected more than 0"),
        ({"boundary": -0.1}, "objective.tcm.boundary: found -0.1; expected more than 0"),
        ({"share": 1.0}, "objective.tcm.share: found 1.0; expected a share between 0 and 1"),
        ({"stage1": ""}, "objective.tcm.stage1: found nothing; expected 'start', a diffusers"),
        ({"factor": 1.0}, "objective.ct.factor: found 1.0; expected more than 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError) as caught:
        build({"tcm": options}, TERMS, FLOW_WORLD.times[:-1])
    assert str(caught.value).startswith(message)


def test_a_student_that_steps_from_below_the_transition_is_refused():
    total, schedule = 1.0 * TCM(), FLOW_WORLD.schedule
    with pytest.raises(InputError, match="found 2.0 and a step of the student from sigma"):
        total.check_grid(schedule, FLOW_WORLD.times[:-1])
    total.check_grid(schedule, one_step(FLOW_WORLD).times[:-1])


def test_stage_1_is_the_students_start_and_no_other_teacher_is_kept(tmp_path):
    def prepared(init):
        path = config_file(
            tmp_path / "config.py",
            teacher="asset:shapes_teacher",
            objective={"tcm": {}},
            student={"steps": 1, "timesteps": (900,), "init": init},
            data={"world": "gadjax.worlds.shapes", "length": 16},
        )
        return prepare(read_config(["--config", str(path)]), abstract=True)

    for init in ("random", "teacher"):
        run = prepared(init)
        backbone = run.pipeline.backbone
        key = backbone if init == "teacher" else "start"
        assert run.sources == {"tcm/stage1": key}
        assert (backbone in run.frozen) == (init == "teacher")
        assert run.networks(run.frozen)["tcm/stage1"] is run.frozen[key]
