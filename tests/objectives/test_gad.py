import itertools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    GUIDANCE,
    WORLDS,
    D,
    all_worlds,
    central,
    exact_map,
    flat,
    gaussian_map,
    gaussian_params,
    gaussian_walk,
    guided_text,
    make_batch,
    mixture_params,
    one_step,
    perfect_student,
)
from several import run_on_devices

from gadjax.diffusion.geometry import Directions, directions, draw_blocks
from gadjax.diffusion.rollout import interpolate_times, rollout
from gadjax.diffusion.samplers import fresh_noise
from gadjax.errors import InputError
from gadjax.objectives import DMD, GAD, Anchor, Regression, TeacherMap
from gadjax.objectives.base import stream_keys
from gadjax.objectives.common import student_map, student_tangents
from gadjax.ops.flops import flops
from gadjax.parallel.sharding import batch_sharding, make_mesh, replicated
from gadjax.training.backward_simulation import stratified_step_indices
from gadjax.training.state import create_state
from gadjax.training.steps import student_step

SQUARE = {"loss": "square"}
ends = pytest.mark.parametrize("end", ["next", "clean"])


@pytest.mark.parametrize("name,end", [("ddpm", "clean"), ("flow", "next")])
def test_tangents_are_those_of_the_maps_at_the_students_latent(name, end):
    """Against central differences in float64, for a student and a teacher that are not linear."""
    world, term, samples = WORLDS[name], GAD(end=end, steps=3), 8
    with jax.enable_x64(True):
        batch = make_batch(samples, dtype=float)
        student = world.student_params(bend=0.5, dtype=float)
        teacher = mixture_params(dtype=float)

        @jax.jit
        def run(batch, student, teacher):
            context = world.context(term, batch, student, None, teacher)
            x, v, t, stop = (
                context.x_BHWC,
                context.direction_JNHWC[0],
                context.t_B,
                context.next_B if end == "next" else jnp.full(samples, world.schedule.clean),
            )
            alpha, sigma = (u[:, None, None, None] for u in world.schedule.alpha_sigma(stop))

            def of_student(x):
                pred = world.denoiser(student, x, t, batch.cond)
                return alpha * pred.x0 + sigma * pred.eps

            def of_teacher(x):
                grid = interpolate_times(t, stop.astype(t.dtype), 3)
                return rollout(context.teacher, world.schedule, x, grid).end

            value, pushed = context.maps[TeacherMap(end, 3)]
            pairs = {
                "student": (
                    student_map(context, end),
                    student_tangents(context, end)[0],
                    of_student(x),
                    central(of_student, x, v),
                ),
                "teacher": (value, pushed[0], of_teacher(x), central(of_teacher, x, v)),
            }
            walk = rollout(
                lambda x, t: world.denoiser(student, x, t, batch.cond),
                world.schedule,
                batch.noise,
                np.array(world.times),
            )
            return pairs, x, v, context.step_B, walk.x

        pairs, x, v, step, states = jax.device_get(run(batch, student, teacher))
        for value, pushed, expected, slope in pairs.values():
            assert np.abs(value - expected).max() < 1e-12 * np.abs(expected).max()
            assert np.abs(pushed - slope).max() < 1e-8 * np.abs(slope).max()
        np.testing.assert_array_equal(step, stratified_step_indices(np.arange(samples), 4))

        # x is where the student's own walk from z is before its drawn step.
        np.testing.assert_array_equal(x[step == 0], np.asarray(batch.noise)[step == 0])
        np.testing.assert_allclose(x, states[step, np.arange(samples)], rtol=1e-6, atol=1e-7)
        assert abs(float(v.std()) - 1) < 0.3


@all_worlds
def test_the_targets_are_products_of_the_steps_matrices(world):
    """DDIM in a gaussian world is linear, so that J_T is a product of K matrices."""
    steps, samples = 6, 16
    term = GAD(steps=steps)

    @jax.jit
    def run(batch, student, teacher):
        context = world.context(term, batch, student, None, teacher)
        maps = context.maps[TeacherMap("next", steps)]
        return (maps[0], maps[1][0]), context.x_BHWC, context.direction_JNHWC[0]

    with jax.enable_x64(True):
        batch, teacher = make_batch(samples, dtype=float), gaussian_params(dtype=float)
        (value, pushed), x, v = run(batch, world.student_params(dtype=float), teacher)
    step = stratified_step_indices(np.arange(samples), 4)
    start, end = np.array(world.times)[step], np.array(world.times)[step + 1]
    times = start + np.linspace(0, 1, steps + 1)[:, None] * (end - start)
    jacobian, shift = gaussian_walk(teacher, world.schedule, times, guided_text(batch))
    # The step keeps its times, and so its alpha and sigma, in float32.
    expected = np.einsum("bij,bj->bi", jacobian, flat(v))
    assert np.abs(flat(pushed) - expected).max() < 1e-6 * np.abs(expected).max()
    expected = np.einsum("bij,bj->bi", jacobian, flat(x)) + shift
    assert np.abs(flat(value) - expected).max() < 1e-6 * np.abs(expected).max()


COUNTS = (128, 256)


def targets(world, end, batch, student, teacher):
    """Maps and tangents in ever smaller steps, and their inputs."""

    @jax.jit
    def run(batch, student, teacher):
        actual = []
        for steps in COUNTS:
            context = world.context(GAD(end, steps), batch, student, None, teacher)
            value, pushed = context.maps[TeacherMap(end, steps)]
            actual.append((value, pushed[0]))
        return actual, context.x_BHWC, context.direction_JNHWC[0]

    return run(batch, student, teacher)


def check_first_order(actual, value, pushed):
    errors = np.array(
        [[np.abs(flat(a) - value).max(), np.abs(flat(b) - pushed).max()] for a, b in actual]
    )
    slopes = -np.diff(np.log2(errors), axis=0)[0]
    print("relative errors", errors[-1] / [np.abs(value).max(), np.abs(pushed).max()], slopes)
    assert np.all(np.abs(slopes - 1) < 0.1)
    assert np.all(errors[-1] < 0.02 * np.array([np.abs(value).max(), np.abs(pushed).max()]))


@all_worlds
@ends
def test_the_targets_converge_to_a_gaussians_exact_jacobian(world, end):
    """At first order in the step, which is DDIM's, from every step of the student's grid."""
    with jax.enable_x64(True):
        batch, teacher = make_batch(8, dtype=float), gaussian_params(dtype=float)
        student = world.student_params(dtype=float)
        actual, x, v = targets(world, end, batch, student, teacher)
    step = stratified_step_indices(np.arange(8), 4)
    start, stop = np.array(world.times)[step], np.array(world.times)[step + 1]
    if end == "clean":
        stop = np.full(8, world.times[-1])
    text = guided_text(batch)
    value, jacobian = gaussian_map(teacher, world.schedule, flat(x), start, stop, text)
    check_first_order(actual, value, np.einsum("bij,bj->bi", jacobian, flat(v)))


@pytest.mark.parametrize("name,end", [("ddpm", "clean"), ("flow", "next")])
def test_the_targets_converge_to_the_odes_derivative(name, end):
    """Where neither map nor Jacobian is linear: a guided mixture, by Runge-Kutta."""
    world = WORLDS[name]
    with jax.enable_x64(True):
        batch = make_batch(32, dtype=float)
        student, teacher = world.student_params(dtype=float), mixture_params(dtype=float)
        actual, x, v = targets(world, end, batch, student, teacher)
        stop = world.times[-1] if end == "clean" else world.times[2]

        def predict(x, t):
            return world.denoiser.guided(teacher, x, t, batch.cond, batch.null, GUIDANCE)

        @jax.jit
        def exact(x, v):
            walk = lambda x: exact_map(predict, world.schedule, x, world.times[1], stop)  # noqa: E731
            return jax.jvp(walk, (x,), (v,))

        drawn = stratified_step_indices(np.arange(32), 4) == 1
        actual, value, pushed = jax.tree.map(lambda x: x[drawn], (actual, *exact(x, v)))
    check_first_order(actual, flat(value), flat(pushed))


def test_the_formulas_of_the_gaussian_world():
    """The exact map and its Jacobian against Runge-Kutta of the posterior mean."""
    world = DDPM_WORLD
    with jax.enable_x64(True):
        batch, teacher = make_batch(2, dtype=float), gaussian_params(dtype=float)

        def predict(x, t):
            return world.denoiser.guided(teacher, x, t, batch.cond, batch.null, GUIDANCE)

        v = batch.noise[::-1]
        walk = lambda x: exact_map(predict, world.schedule, x, 500, -1)  # noqa: E731
        actual = jax.jit(lambda x: jax.jvp(walk, (x,), (v,)))(batch.noise)
    times, text = (np.full(2, 500.0), np.full(2, -1.0)), guided_text(batch)
    value, jacobian = gaussian_map(teacher, world.schedule, flat(batch.noise), *times, text)
    np.testing.assert_allclose(flat(actual[0]), value, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        flat(actual[1]), np.einsum("bij,bj->bi", jacobian, flat(v)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
def test_the_mean_over_directions_is_the_distance_of_the_jacobians(direction):
    """E |(J_S - J_T) v|^2 / D = |J_S - J_T|_F^2 / D; here all samples share both Jacobians."""
    world, samples = one_step(FLOW_WORLD), 8192
    student, teacher = world.student_params(), gaussian_params()
    term = GAD(steps=3, direction=direction, **SQUARE, normalize=False)
    batch = make_batch(samples)
    loss_B = np.asarray(world.losses(term)(batch, student, None, teacher)[0], float)
    times = np.linspace(world.times[0], world.times[1], 4)[:, None]
    target = gaussian_walk(teacher, world.schedule, times, 0)[0][0]
    # Down to the clean end a step is its x0.
    exact = np.sum((np.asarray(student["step0"]["matrix"], float) - target) ** 2) / D
    error = loss_B.std() / samples**0.5
    assert error < 0.02 * exact and abs(loss_B.mean() - exact) < 4 * error


@all_worlds
def test_zero_at_the_teachers_map_and_only_there(world):
    batch, teacher = make_batch(16, text_scale=0.0), gaussian_params()
    right = perfect_student(world, teacher, 4)
    run = world.losses(GAD(**SQUARE))
    loss_B, metrics = run(batch, right, None, teacher)
    assert float(loss_B.max()) < 1e-9
    assert float(metrics["cosine"]) == pytest.approx(1, abs=1e-5)
    assert float(metrics["norm_ratio"]) == pytest.approx(1, abs=1e-5)
    doubled = {k: v | {"matrix": 2 * v["matrix"]} for k, v in right.items()}
    assert float(run(batch, doubled, None, teacher)[0].mean()) > 0.1


def test_the_relative_loss_is_the_plain_one_over_the_targets_square():
    world = DDPM_WORLD

    @jax.jit
    def run(batch, student, teacher):
        context = world.context(GAD(), batch, student, None, teacher)
        target, actual = context.maps[TeacherMap()][1][0], student_tangents(context, "next")[0]
        plain = GAD(**SQUARE, normalize=False)(context)[0]
        return GAD(**SQUARE)(context), plain, GAD()(context)[0], target, actual

    with jax.enable_x64(True):
        student = world.student_params(bend=0.3, dtype=float)
        given = make_batch(16, dtype=float), student, mixture_params(dtype=float)
        (relative, metrics), plain, polar, target, actual = jax.device_get(run(*given))
    size = (target**2).mean((1, 2, 3))
    np.testing.assert_allclose(plain, ((actual - target) ** 2).mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(relative * size, plain, rtol=1e-6)
    a, b = flat(actual), flat(target)
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(1) / lengths[0] / lengths[1]
    expected = 2 * (1 - cosine) + np.log(lengths[0] / lengths[1]) ** 2
    np.testing.assert_allclose(polar, expected, rtol=1e-6)
    assert float(metrics["cosine"]) == pytest.approx(cosine.mean(), rel=1e-6)
    assert float(metrics["norm_ratio"]) == pytest.approx((lengths[0] / lengths[1]).mean(), rel=1e-6)


@all_worlds
def test_the_full_map_has_every_step_of_both(world):
    """Its tangents against central differences in float64, from z, not detached by an anchor."""
    term = GAD(end="whole", steps=6, directions=2) + Anchor(steps=2)
    with jax.enable_x64(True):
        batch, teacher = make_batch(4, dtype=float), mixture_params(dtype=float)
        student = world.student_params(bend=0.5, dtype=float)

        @jax.jit
        def run(batch, student, teacher):
            context = world.context(term, batch, student, None, teacher)

            def of_student(z):
                walk = rollout(
                    lambda x, t: world.denoiser(student, x, t, batch.cond),
                    world.schedule,
                    z,
                    jnp.asarray(world.times),
                )
                return walk.end

            def of_teacher(z):
                grid = jnp.linspace(world.times[0], world.times[-1], 7)
                return rollout(context.teacher, world.schedule, z, grid).end

            pairs = context.full_map, context.maps[TeacherMap("whole", 6)]
            v_J = context.direction_JNHWC
            slopes = [
                jnp.stack([central(f, batch.noise, v) for v in v_J])
                for f in (of_student, of_teacher)
            ]
            return pairs, slopes, (of_student(batch.noise), of_teacher(batch.noise))

        pairs, slopes, values = jax.device_get(run(batch, student, teacher))
    for (value, pushed), slope, expected in zip(pairs, slopes, values, strict=True):
        assert pushed.shape == (2, *expected.shape)
        assert np.abs(value - expected).max() < 1e-6 * np.abs(expected).max()
        assert np.abs(pushed - slope).max() < 1e-6 * np.abs(slope).max()


@all_worlds
def test_the_tangent_of_a_student_with_fresh_noise_holds_the_later_noises(world):
    """The full map's tangent against central differences in float64, with the noise of z itself."""
    term = GAD(end="whole", steps=6)
    with jax.enable_x64(True):
        batch, teacher = make_batch(4, dtype=float), mixture_params(dtype=float)
        student = world.student_params(bend=0.5, dtype=float)

        @jax.jit
        def run(batch, student, teacher):
            context = world.context(term, batch, student, None, teacher, rollout="fresh_noise")
            noise = fresh_noise(batch.noise)

            def of_student(z):
                x = z
                for k, (t, t_next) in enumerate(itertools.pairwise(world.times)):
                    x0 = world.denoiser(student, x, t, batch.cond).x0
                    alpha, sigma = world.schedule.alpha_sigma(jnp.asarray(t_next))
                    x = alpha * x0 + sigma * noise.draw(k)
                return x

            slope = central(of_student, batch.noise, context.direction_JNHWC[0])
            return context.full_map, of_student(batch.noise), slope

        (value, pushed), expected, slope = jax.device_get(run(batch, student, teacher))
    assert np.abs(value - expected).max() < 1e-6 * np.abs(expected).max()
    assert np.abs(pushed[0] - slope).max() < 1e-6 * np.abs(slope).max()


def test_several_directions_are_the_mean_of_single_ones():
    """The loss over three directions, against their jvps taken one by one."""
    world, term, batch = DDPM_WORLD, GAD(directions=3, **SQUARE), make_batch(8)
    student, teacher = world.student_params(bend=0.3), mixture_params()

    @jax.jit
    def run(student):
        context = world.context(term, batch, student, None, teacher)
        actual, target = student_tangents(context, "next"), context.maps[TeacherMap()][1]
        x, losses = context.x_BHWC, []

        def of_student(x):
            pred = world.denoiser(student, x, context.t_B, batch.cond)
            alpha, sigma = world.schedule.alpha_sigma(context.next_B)
            alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
            return alpha * pred.x0 + sigma * pred.eps

        for j in range(3):
            alone = jax.jvp(of_student, (x,), (context.direction_JNHWC[j],))[1]
            error = ((alone - target[j]) ** 2).mean((1, 2, 3))
            losses.append(error / (target[j] ** 2).mean((1, 2, 3)))
        return term(context)[0], sum(losses) / 3, actual

    loss_B, expected_B, actual = run(student)
    np.testing.assert_allclose(loss_B, expected_B, rtol=1e-4)
    assert float(jnp.abs(actual[0] - actual[1]).min(axis=0).max()) > 0


def test_step_weights_choose_the_steps():
    world, batch = FLOW_WORLD, make_batch(8)
    student, teacher = world.student_params(), gaussian_params()
    plain = world.losses(GAD())(batch, student, None, teacher)[0]
    first = world.losses(GAD(step_weights=(2.0, 0.0, 0.0, 0.5)))(batch, student, None, teacher)[0]
    np.testing.assert_allclose(
        first,
        np.array([2.0, 0, 0, 0.5])[stratified_step_indices(np.arange(8), 4)] * plain,
        rtol=1e-5,
    )


def test_control_directions_are_the_teachers_gradient():
    """In a gaussian world the map is J x + shift, so that v is J^T w at length sqrt(D)."""
    world, term, samples = DDPM_WORLD, GAD(direction="control", steps=3), 8
    batch, teacher = make_batch(samples), gaussian_params()

    @jax.jit
    def run(student):
        context = world.context(term, batch, student, None, teacher)
        keys = stream_keys(batch.key, "direction")
        w = directions(Directions("low_frequency"), keys, batch.noise.shape[1:])[0]
        return context.direction_JNHWC[0], w

    v, w = run(world.student_params())
    step = stratified_step_indices(np.arange(samples), 4)
    start, end = np.array(world.times)[step], np.array(world.times)[step + 1]
    times = start + np.linspace(0, 1, 4)[:, None] * (end - start)
    jacobian, _ = gaussian_walk(teacher, world.schedule, times, guided_text(batch))
    expected = np.einsum("bij,bi->bj", jacobian, flat(w))
    expected *= np.sqrt(D) / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(flat(v), expected, rtol=2e-4, atol=2e-5)


def test_what_cannot_be_matched_is_flattened_by_the_square_and_not_by_the_polar_loss():
    """For multiples of tangents at cosine c to the teacher's, the square is least at c times the
    teacher's norm and the polar loss at that norm; both agree at c = 1."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(1, 1, 2, 3, 4))
    other = rng.normal(size=target.shape)
    other -= target * (other * target).sum() / (target**2).sum()
    other *= np.linalg.norm(target) / np.linalg.norm(other)
    for c in (0.3, 0.8):
        actual = c * target + (1 - c**2) ** 0.5 * other
        scales = np.linspace(0.05, 1.5, 146)
        square, polar = (at(scales, actual, target, **more) for more in (SQUARE, {}))
        assert scales[square.argmin()] == pytest.approx(c, abs=0.006)
        assert scales[polar.argmin()] == pytest.approx(1, abs=0.006)
    near = target + 1e-3 * other
    for scale in (0.999, 1.001):
        square, polar = (at([scale], near, target, **more)[0] for more in (SQUARE, {}))
        assert polar == pytest.approx(square, rel=3e-3)


def at(scales, actual, target, **options):
    """Losses of multiples of given tangents."""
    term = GAD(end="whole", **options)
    values = []
    with jax.enable_x64(True):
        for scale in scales:
            context = SimpleNamespace(
                maps={TeacherMap("whole", term.steps): (None, jnp.asarray(target))},
                full_map=(None, jnp.asarray(scale * actual)),
                blocks=None,
            )
            values.append(float(term(context)[0][0]))
    return np.array(values)


@pytest.mark.parametrize("options", [SQUARE, {}], ids=["square", "polar"])
def test_reverse_over_forward_is_the_gradient_of_the_loss(options):
    """Against central differences in float64, along one direction in all parameters.

    The student's latents depend on its parameters but have a stop-gradient, so that the
    comparison is made with one step, whose latent is z.
    """
    world, term = one_step(DDPM_WORLD), GAD(**options)
    with jax.enable_x64(True):
        batch = make_batch(4, dtype=float)
        student = world.student_params(bend=0.5, dtype=float)
        direction = world.student_params(seed=9, bend=0.5, dtype=float)
        teacher = mixture_params(dtype=float)
        run = jax.jit(
            lambda student: term(world.context(term, batch, student, None, teacher))[0].mean()
        )

        def at(h):
            return float(run(jax.tree.map(lambda p, w: p + h * w, student, direction)))

        slope = jax.jit(jax.grad(run.__wrapped__))(student)
        actual = sum(
            float((g * w).sum())
            for g, w in zip(*map(jax.tree.leaves, (slope, direction)), strict=True)
        )
        assert actual == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-7)


PLAIN = {role: optax.sgd(1.0) for role in ("student", "critic")}


def start(objective, **more):
    """An update of 16 samples, and its state."""
    params = {"student": FLOW_WORLD.student_params(bend=0.2), "critic": gaussian_params(3)}
    spec = FLOW_WORLD.step_spec(objective, optimizers=PLAIN, **more)
    nets = {"teacher": gaussian_params()}
    return (lambda state, batch: student_step(spec, state, nets, batch)), create_state(
        params, PLAIN
    )


def update(objective, mesh, **more):
    """The student after an update by a plain gradient step, and its metrics."""
    step, state = start(objective, batch_shards=mesh.size, **more)
    state = jax.device_put(state, replicated(mesh))
    batch = jax.device_put(make_batch(16), batch_sharding(mesh))
    new, metrics = jax.jit(step)(state, batch)
    return jax.device_get((new.params["student"], metrics))


@pytest.mark.parametrize(
    "beside,options",
    [
        (Anchor(), {"step_weights": (0.5, 1.0, 2.0, 3.0)}),
        (Regression(end="clean", steps=3), {"end": "clean", "steps": 3, "directions": 2}),
        (Anchor() + DMD(backprop="all"), {"end": "whole", "steps": 6}),
        (Regression(), {"direction": "control", "loss": "square"}),
    ],
    ids=["anchor", "clean", "whole", "control"],
)
@pytest.mark.parametrize("k", [2, 4])
def test_tangents_of_one_in_k_samples_are_theirs_at_k_times_the_weight(beside, options, k):
    """And everything else is as with the tangents of all."""
    world, batch = FLOW_WORLD, make_batch(16)
    nets = world.student_params(bend=0.4), gaussian_params(3), mixture_params()
    blocks = draw_blocks(k, stream_keys(batch.key, "blocks"))
    chosen = np.arange(16) // k * k + np.repeat(blocks.index_N, k) == np.arange(16)
    assert chosen.sum() == 16 // k and 0 < np.std(blocks.index_N)

    def slope(weight_B, **more):
        """Gradient with GAD's losses weighted, and every term's loss."""
        objective = beside + 0.3 * GAD(**options, **more)

        def loss(student, batch, critic, teacher):
            context = world.context(objective, batch, student, critic, teacher)
            losses = {
                name: weight * loss_B * (weight_B if name == "gad" else 1)
                for name, weight, loss_B, _ in objective.term_losses(context)
            }
            return jnp.mean(sum(losses.values())), losses

        return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(nets[0], batch, *nets[1:]))

    expected, actual = slope(k * chosen), slope(1.0, one_in=k)
    assert (actual[1]["gad"] > 0).sum() == 16 // k
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * np.abs(b).max())


def worker():
    """On eight devices and in microbatches the same samples are chosen, and the update is equal."""
    objective = DMD() + GAD(one_in=2) + Anchor()
    one = update(objective, make_mesh({"data": 1}, jax.devices()[:1]))
    assert float(one[1]["loss/gad"]) > 0.1
    for devices, microbatches in ((1, 2), (1, 4), (1, 8), (8, 1), (4, 2)):
        mesh = make_mesh({"data": devices}, jax.devices()[:devices])
        other = update(objective, mesh, microbatches=microbatches)
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())


def test_one_in_two_on_eight_devices_and_in_microbatches():
    run_on_devices(8, __file__)


def test_the_price_falls_with_the_samples():
    """In operations of an update beside those of the same without GAD."""

    def cost(objective):
        return flops(*start(objective), make_batch(16))

    none = cost(DMD())
    prices = {k: cost(DMD() + GAD(one_in=k)) - none for k in (1, 2, 4)}
    print({k: f"{price / prices[1]:.2f}" for k, price in prices.items()})
    for k in (2, 4):
        assert prices[k] < 1.15 * prices[1] / k


@pytest.mark.parametrize(
    "end,students,expected",
    [("next", 4, 4), ("next", 2, 4), ("next", 1, 8), ("clean", 4, 8), ("whole", 2, 8)],
)
def test_the_default_number_of_the_teachers_steps(end, students, expected):
    world = replace(FLOW_WORLD, times=(*FLOW_WORLD.times[:students], FLOW_WORLD.times[-1]))
    objective = GAD(end=end) + GAD(end=end, steps=expected)
    student = {f"step{k}": FLOW_WORLD.student_params()[f"step{k}"] for k in range(students)}

    @jax.jit
    def maps(batch):
        context = world.context(objective, batch, student, None, mixture_params())
        return list(context.maps.values())

    by_default, explicit = jax.device_get(maps(make_batch(8)))
    np.testing.assert_array_equal(by_default[1], explicit[1])


def test_bad_options():
    with pytest.raises(InputError, match="objective.gad.one_in: found 0; expected 1 or more"):
        GAD(one_in=0)
    with pytest.raises(InputError, match="objective.gad.loss: found 'l1'; expected square or"):
        GAD(loss="l1")
    with pytest.raises(InputError, match="normalize: found False with the polar loss"):
        GAD(normalize=False)
    with pytest.raises(InputError, match="found end 'x0'; expected 'next', 'clean' or 'whole'"):
        _ = GAD(end="x0").needs
    with pytest.raises(InputError, match="step_weights: found 2 of them; expected 0 or 4"):
        GAD(step_weights=(1.0, 0.0)).check(DDPM_WORLD.times[:-1])
    with pytest.raises(InputError, match="direction: found 'sphere'"):
        _ = GAD(direction="sphere").needs
    with pytest.raises(InputError, match="found a map of -1 steps"):
        _ = GAD(steps=-1).needs


if __name__ == "__main__":
    worker()
