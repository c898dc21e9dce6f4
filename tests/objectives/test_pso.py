import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, flow_first, gaussian_params, gaussian_walk, make_batch
from formula_terms import pictures
from tiny_run import config_file

from gadjax.errors import InputError
from gadjax.objectives import PSO, TERMS, build
from gadjax.training.config import read_config
from gadjax.training.context import Roles, make_context
from gadjax.training.setup import prepare

SAMPLES = 8


def context_of(world, term, student, reference, batch):
    roles = Roles(student, networks={"pso/reference": reference})
    return make_context(world.step_spec(term), term.needs, roles, batch)


def by_hand(world, context, student, reference, beta):
    """log(1 + exp(-beta ((e_R(w) - e_S(w)) - (e_R(l) - e_S(l))))), with DDIM written out."""
    batch, t, cond = context.batch, context.t_B, context.batch.cond
    times = [jnp.full(SAMPLES, time, float) for time in world.times]

    def levels(t):
        return [v[:, None, None, None] for v in world.schedule.alpha_sigma(t)]

    x = batch.noise
    for start, end in zip(times[:-1], times[1:], strict=True):
        prediction, (alpha, sigma) = world.denoiser(reference, x, start, cond), levels(end)
        x = alpha * prediction.x0 + sigma * prediction.eps
    x = prediction.x0
    alpha, sigma = levels(t)

    def errors(params):
        for y in (batch.x0, x):
            x0 = world.denoiser(params, alpha * y + sigma * context.normal("eps"), t, cond).x0
            yield ((x0 - y) ** 2).mean((1, 2, 3))

    (w_s, l_s), (w_r, l_r) = errors(student), errors(jax.lax.stop_gradient(reference))
    return jnp.log1p(jnp.exp(-beta * ((w_r - w_s) - jax.lax.stop_gradient(l_r) + l_s)))


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    with jax.enable_x64(True):
        batch, term = make_batch(SAMPLES, dtype=float)._replace(x0=pictures(float)), PSO(0.7)
        student, reference = (world.student_params(s, bend=0.4, dtype=float) for s in (1, 2))

        def ours(student, reference):
            return term(context_of(world, term, student, reference, batch))[0].mean()

        def theirs(student):
            context = context_of(world, term, student, reference, batch)
            return by_hand(world, context, student, reference, 0.7).mean()

        @jax.jit
        def run(*nets):
            both = jax.value_and_grad(ours, (0, 1))(*nets)
            return both, jax.value_and_grad(theirs)(nets[0]), ours(nets[0], nets[0])

        ((value, (slope, frozen)), expected, same) = jax.device_get(run(student, reference))
    assert same == pytest.approx(np.log(2), abs=1e-12)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
    for a, b in zip(jax.tree.leaves((value, slope)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * np.abs(b).max())
        assert np.abs(b).max() > 1e-6


def test_the_rejected_sample_is_the_references_in_the_students_steps():
    reference, batch = gaussian_params(), make_batch(SAMPLES)._replace(x0=pictures())
    term, world = PSO(), FLOW_WORLD
    context = context_of(world, term, world.student_params(), reference, batch)
    actual = np.asarray(jax.jit(lambda: term.reference_sample(context))(), float)
    times = np.broadcast_to(np.array(world.times)[:, None], (len(world.times), SAMPLES))
    text = np.asarray(batch.cond.text[:, 0], float)
    jacobian, shift = gaussian_walk(reference, world.schedule, times, text)
    z = np.asarray(batch.noise, float).reshape(SAMPLES, -1)
    expected = np.einsum("bij,bj->bi", jacobian, z) + shift
    np.testing.assert_allclose(actual.reshape(SAMPLES, -1), expected, rtol=1e-4, atol=1e-4)


def test_descent_predicts_pictures_better_and_the_references_samples_worse():
    """From the start, where the loss is log 2."""
    world, term = FLOW_WORLD, PSO(beta=2.0)
    start = world.student_params()
    batch = make_batch(64)._replace(x0=pictures(samples=64))

    @jax.jit
    def ratios(student):
        context = context_of(world, term, student, start, batch)
        rejected = term.log_ratio(context, term.reference_sample(context))
        return term.log_ratio(context, batch.x0).mean(), rejected.mean(), term(context)[0].mean()

    @jax.jit
    def step(student):
        slope = jax.grad(lambda s: ratios(s)[2])(student)
        return jax.tree.map(lambda p, g: p - 0.02 * g, student, slope)

    moved = start
    for _ in range(20):
        moved = step(moved)
    preferred, rejected, loss = map(float, ratios(moved))
    assert preferred > 0 > rejected and loss < np.log(2) - 0.01


def test_the_reference_is_the_students_start_and_no_other_teacher_is_kept(tmp_path):
    def prepared(init):
        path = config_file(
            tmp_path / "config.py",
            teacher="asset:shapes_teacher",
            objective={"pso": {}},
            student={"steps": 2, "timesteps": (900, 400), "init": init},
            data={"world": "gadjax.worlds.shapes", "length": 16},
        )
        return prepare(read_config(["--config", str(path)]), abstract=True)

    for init in ("random", "teacher"):
        run = prepared(init)
        backbone = run.pipeline.backbone
        key = backbone if init == "teacher" else "start"
        assert run.sources == {"pso/reference": key}
        assert (backbone in run.frozen) == (init == "teacher")
        assert run.networks(run.frozen)["pso/reference"] is run.frozen[key]


@pytest.mark.parametrize(
    "options,rollout,message",
    [
        ({"beta": 0.0}, "ode", "objective.pso.beta: found 0.0; expected more than 0"),
        ({"reference": ""}, "ode", "objective.pso.reference: found nothing; expected 'start'"),
        ({}, "fresh_noise", "objective.pso: found a loss of the student's next latent"),
    ],
)
def test_bad_options(options, rollout, message):
    with pytest.raises(InputError) as caught:
        build({"pso": options}, TERMS, FLOW_WORLD.times[:-1], rollout)
    assert str(caught.value).startswith(message)
