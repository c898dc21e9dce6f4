from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, SHAPE, all_worlds, make_batch
from tiny_run import config_file

from gadjax.analytic.bench import Bench
from gadjax.analytic.teachers import Mixture
from gadjax.errors import InputError
from gadjax.objectives import CT, GAD, Denoising
from gadjax.training.config import as_json, read_config
from gadjax.training.context import Roles, make_context
from gadjax.training.setup import prepare
from gadjax.training.workdir import objective_needs, sampling_from_config

sg = jax.lax.stop_gradient
SAMPLES = 16


def context_of(world, term, student, batch, share=0.0):
    context = make_context(world.step_spec(term), term.needs, Roles(student), batch)
    return replace(context, share=share)


def log_ratio(world, t):
    alpha, sigma = world.schedule.alpha_sigma(np.asarray(t, float))
    return np.log(sigma) - np.log(alpha)


def released(world, term, context, student):
    """ECT's loss of pictures y in its own variables, y + u eps; of the stage of the clock."""
    batch, schedule = context.batch, world.schedule
    first = schedule.clean + 1
    knots = np.append(np.arange(first, world.times[0]), world.times[0])
    alpha, sigma = schedule.alpha_sigma(knots)
    angles = np.arctan2(sigma, alpha)

    def time_of(u):
        return jnp.interp(jnp.arctan(u), angles, knots)

    def level(t):
        alpha, sigma = schedule.alpha_sigma(t)
        return sigma / alpha

    def network(u, t):
        alpha = schedule.alpha_sigma(t)[0][:, None, None, None]
        y_u = batch.x0 + u[:, None, None, None] * batch.noise
        return world.denoiser(student, alpha * y_u, t, batch.cond).x0

    normal = jax.scipy.special.ndtri(context.uniform("angle"))
    t = time_of(jnp.exp(normal * term.std + term.mean))
    u = level(t)
    stage = int(context.share * term.stages)
    decay = 1 / term.factor ** (stage + 1)
    r = jnp.clip(u * (1 - decay * (1 + 8 * jax.nn.sigmoid(-u))), 0)
    # The networks' first level, and others as their times have them.
    below, time = r < sigma[0] / alpha[0], time_of(r)
    r = jnp.where(below, 0, level(time))
    mask = (r > 0)[:, None, None, None]
    other = jnp.where(mask, sg(network(r, time)), batch.x0)
    square = ((network(u, t) - other) ** 2).reshape(len(u), -1).sum(-1)
    size = batch.x0[0].size
    c = term.huber * size**0.5
    return (jnp.sqrt(square + c**2) - c) / (u - r) / size**0.5, r


@all_worlds
def test_loss_and_gradient_are_those_of_the_released_code(world):
    term = CT(mean=0.2, std=1.5, stages=4, huber=0.05)
    with jax.enable_x64(True):
        pictures = np.random.default_rng(5).normal(size=(SAMPLES, *SHAPE))
        batch = make_batch(SAMPLES, dtype=float)._replace(x0=jnp.asarray(pictures))
        student = world.student_params(bend=0.4, dtype=float)

        @jax.jit
        def run(student, batch):
            def ours(student):
                loss_B, metrics = term(context_of(world, term, student, batch, 0.3))
                return loss_B.mean(), (loss_B, metrics)

            def theirs(student):
                context = context_of(world, term, student, batch)
                loss_B, r = released(world, term, replace(context, share=0.3), student)
                return loss_B.mean(), (loss_B, r)

            return [jax.value_and_grad(f, has_aux=True)(student) for f in (ours, theirs)]

        (a, slope), (b, expected) = jax.device_get(run(student, batch))
    np.testing.assert_allclose(a[1][0], b[1][0], rtol=1e-10)
    for x, y in zip(*map(jax.tree.leaves, (slope, expected)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-10 * np.abs(y).max())
    clean = np.mean(b[1][1] == 0)
    assert 0 < clean < 1 and a[1][1]["denoising"] == pytest.approx(clean)


@all_worlds
def test_noise_levels_are_log_normal_and_gaps_shrink_by_the_clock(world):
    term, samples = CT(mean=0.3, std=0.5), 4096
    batch = make_batch(samples)._replace(x0=jnp.zeros((samples, *SHAPE)))
    seen = []

    def apply(params, x, t, cond):
        seen.append(t)
        return world.apply(params, x, t, cond)

    @jax.jit
    def times(share):
        seen.clear()
        context = context_of(world, term, world.student_params(), batch, share)
        term(replace(context, denoiser=replace(world.denoiser, apply=apply)))
        return jnp.stack(seen)

    for share, stage in ((0.0, 0), (0.3, 2), (1.0, 7)):
        r, t = np.asarray(times(jnp.float32(share)))
        u = np.exp(log_ratio(world, t))
        if stage == 0:
            normal = np.sort((np.log(u) - 0.3) / 0.5)
            expected = np.asarray(jax.scipy.special.ndtri((np.arange(samples) + 0.5) / samples))
            assert np.abs(normal - expected)[100:-100].max() < 0.12
        gap = (1 + 8 / (1 + np.exp(u))) / 2 ** (stage + 1)
        level = np.maximum(u * (1 - gap), np.exp(log_ratio(world, world.schedule.clean + 1)))
        np.testing.assert_allclose(np.exp(log_ratio(world, r)), level, rtol=2e-3, atol=2e-4)


def test_a_flow_that_starts_at_pure_noise_has_finite_losses():
    term, world = CT(mean=6.0, std=4.0), FLOW_WORLD
    batch = make_batch(512)._replace(x0=jnp.zeros((512, *SHAPE)))
    student = world.student_params()

    def loss(student):
        return term(context_of(world, term, student, batch, 1.0))[0].mean()

    value, slope = jax.jit(jax.value_and_grad(loss))(student)
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves((value, slope)))


def test_the_teacher_is_not_kept_and_the_student_is_sampled_on_its_grid(tmp_path):
    """Nor where it is denoising beside; plain denoising is sampled as a teacher is."""
    path = config_file(
        tmp_path / "config.py",
        teacher="asset:shapes_teacher",
        objective={"ct": {}},
        student={"steps": 2, "timesteps": (900, 400), "rollout": "fresh_noise"},
        data={"world": "gadjax.worlds.shapes", "length": 16},
    )
    config = read_config(["--config", str(path)])
    run = prepare(config, abstract=True)
    assert run.pipeline.backbone not in run.frozen
    sampling = sampling_from_config(as_json(config))
    assert sampling.timesteps == (900, 400) and sampling.guidance == 1
    assert sampling.rollout == "fresh_noise"
    both = as_json(config) | {"objective": {"ct": {}, "denoising": {}}}
    assert sampling_from_config(both).timesteps == (900, 400)
    assert not objective_needs(both).uses_teacher
    alone = as_json(config) | {"objective": {"denoising": {}}}
    assert sampling_from_config(alone).timesteps is None
    assert not Denoising().needs.is_few_step and (CT() + 0.3 * GAD()).needs.uses_teacher


@pytest.mark.slow
def test_it_learns_to_draw_the_data_in_one_step():
    bench = Bench(Mixture.ring(), "flow", 1)
    start = bench.measure(bench.draw, bench.init(jax.random.key(0)))
    result = bench.fit(CT(mean=0.2, std=1.6), 1000)
    assert result.transport_cost < 0.5 * start.transport_cost


@pytest.mark.parametrize(
    "options,message",
    [
        ({"stages": 0}, "objective.ct.stages: found 0; expected 1 or more"),
        ({"factor": 1.0}, "objective.ct.factor: found 1.0; expected more than 1"),
        ({"std": 0.0}, "objective.ct.std: found 0.0; expected more than 0"),
        ({"huber": 0.0}, "objective.ct.huber: found 0.0; expected more than 0"),
        ({"mean": float("nan")}, "objective.ct.mean: found nan; expected a number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        CT(**options)
