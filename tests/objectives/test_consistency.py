from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_form import (
    DDPM_WORLD,
    GUIDANCE,
    SHAPE,
    D,
    flat,
    gaussian_map,
    gaussian_params,
    gaussian_walk,
    guided_text,
    make_batch,
    mixture_params,
)
from smooth_world import WORLDS, Smooth, all_worlds, smooth_params

from gadjax.diffusion.schedules import DDPM, add_noise
from gadjax.errors import InputError
from gadjax.objectives import DMD, GAD, TERMS, Consistency, Needs, build
from gadjax.objectives.base import sample_mean
from gadjax.objectives.consistency import uniform_angle, velocity, velocity_and_update
from gadjax.ops.attention import tangent_pass
from gadjax.types import Prediction


def flow_map(teacher, text=0.0):
    mean = teacher["mean"] + jnp.asarray(text, teacher["mean"].dtype)
    return {"mean": mean, "slope": teacher["variance"], "axes": teacher["basis"]}


def predictors(world, batch, student, teacher):
    def student_pred(x, t):
        return world.denoiser(student, x, t, batch.cond)

    def real(x, t):
        return world.denoiser.guided(teacher, x, t, batch.cond, batch.null, GUIDANCE)

    return student_pred, real


@all_worlds
def test_g_is_the_derivative_of_the_students_x0_along_the_teachers_ode(world):
    """cos a dx0/da by central differences of x0 on Runge-Kutta steps of the ODE, in float64."""
    h, samples = 1e-3, 32
    with jax.enable_x64(True):
        batch = make_batch(samples, dtype=float)
        student, teacher = smooth_params(0.3, dtype=float), mixture_params(dtype=float)
        # Within a unit of time alpha and sigma are linear.
        t = jnp.linspace(world.schedule.clean + 1, world.times[0] - 1, samples).round() + 0.37

        @jax.jit
        def run(x, student, teacher):
            student_pred, real = predictors(world, batch, student, teacher)
            student_F, g = velocity_and_update(student_pred, real(x, t), world.schedule, x, t)
            before, after = (world.schedule.alpha_sigma(jnp.floor(t) + k) for k in (0, 1))
            da, ds = ((b - a)[:, None, None, None] for a, b in zip(before, after, strict=True))

            def speed(x, t):
                pred = real(x, t)
                return da * pred.x0 + ds * pred.eps

            def moved(h):
                k1 = speed(x, t)
                k2 = speed(x + h / 2 * k1, t + h / 2)
                k3 = speed(x + h / 2 * k2, t + h / 2)
                k4 = speed(x + h * k3, t + h)
                return student_pred(x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), t + h).x0

            slope = (moved(h) - moved(-h)) / (2 * h)
            return student_F, g, student_pred(x, t), slope, da, ds

        student_F, g, student_pred, slope, da, ds = jax.device_get(
            run(batch.noise, student, teacher)
        )
    alpha, sigma = (v[:, None, None, None] for v in world.schedule.alpha_sigma(np.asarray(t)))
    square = alpha**2 + sigma**2
    rate = (alpha * ds - sigma * da) / square
    expected = alpha / np.sqrt(square) * slope / rate
    error = np.abs(flat(g - expected)).max(1) / np.abs(flat(expected)).max(1)
    print("relative error of g", error.max())
    assert error.max() < 1e-6
    np.testing.assert_allclose(
        student_F,
        (alpha * student_pred.eps - sigma * student_pred.x0) / np.sqrt(square),
        rtol=1e-9,
        atol=1e-9,
    )


@all_worlds
def test_the_teachers_flow_map_is_the_fixed_point(world):
    """With guidance, under which a gaussian is a gaussian; no other map of the same form is one."""
    with jax.enable_x64(True):
        batch, teacher = make_batch(64, dtype=float), gaussian_params(dtype=float)

        def loss(student):
            context = world.context(Consistency(), batch, student, None, teacher)
            loss_B, metrics = Consistency()(context)
            return loss_B.mean(), metrics["tangent"]

        run = jax.jit(jax.grad(loss, has_aux=True))

        def slope(student):
            gradient, size = jax.device_get(run(student))
            return max(np.abs(leaf).max() for leaf in gradient.values()), float(size)

        right = flow_map(teacher, guided_text(batch))
        gradient, size = slope(right)
        print("size of g", size, "gradient", gradient)
        assert size < 1e-12 and gradient < 1e-10
        wrong = {
            "slope": 1.1 * right["slope"],
            "mean": right["mean"] + 0.1,
            "axes": jnp.roll(right["axes"], 1, axis=1),
        }
        for name, value in wrong.items():
            gradient, size = slope(right | {name: value})
            assert size > 1e-3 and gradient > 1e-4


def test_the_student_is_evaluated_once_and_its_tangent_held():
    """The gradient is that of F alone against -2 g / (rms(g) + 0.1) / numel."""
    world, samples, calls = WORLDS["eps"], 16, []
    batch, teacher = make_batch(samples), mixture_params()

    def watched(params, x, t, cond):
        calls.append("matrix" in params)
        return world.apply(params, x, t, cond)

    denoiser = replace(world.denoiser, apply=watched)

    @jax.jit
    def run(student):
        context = world.context(Consistency(), batch, student, None, teacher)
        context = replace(context, denoiser=denoiser)

        def loss(student):
            return Consistency()(replace(context, student_params=student))[0].mean()

        t = uniform_angle(context)
        x = Consistency().latents(context, t)

        def student_pred(student):
            return lambda x, t: world.denoiser(student, x, t, batch.cond)

        _, g = velocity_and_update(
            student_pred(student), context.teacher(x, t), world.schedule, x, t
        )
        size = jnp.sqrt(sample_mean(g**2))[:, None, None, None]
        _, pull = jax.vjp(
            lambda s: velocity(student_pred(s)(x, t), *world.schedule.alpha_sigma(t)), student
        )
        return jax.grad(loss)(student), pull(-2 * g / (size + 0.1) / g.size)[0]

    actual, expected = jax.device_get(run(smooth_params(0.3)))
    assert calls == [True]
    for name in actual:
        scale = np.abs(expected[name]).max()
        assert scale > 1e-4
        np.testing.assert_allclose(actual[name], expected[name], atol=1e-5 * scale)


def flops(f, *given):
    return jax.jit(f).lower(*given).compile().cost_analysis()["flops"]


class Wide(Smooth):
    """A student that costs far more than everything else."""

    def student(self, params, x, t_B, alpha, sigma, text):
        hidden = jnp.tanh(jnp.tanh(x @ params["in"] + alpha) @ params["deep"])
        x0 = hidden @ params["in"].T
        return Prediction(x0, (x - alpha * x0) / sigma)


def test_a_tangent_costs_one_evaluation_and_unused_needs_nothing():
    """The reverse pass is that of the plain evaluation; unused needs are eliminated."""
    world, term = Wide(DDPM(), "eps", (899.0, -1.0)), Consistency()
    batch, teacher = make_batch(16), gaussian_params()
    student = {"in": jnp.full((D, 256), 0.1), "deep": jnp.full((256, 256), 0.1)}

    def asking(needs):
        asked = type("Asked", (), {"needs": needs})

        def loss(student):
            return term(world.context(asked, batch, student, None, teacher))[0].mean()

        return jax.grad(loss)

    def plain(student):
        student_F = world.denoiser(student, batch.noise, jnp.full(16, 500.0), batch.cond)
        return (student_F.x0**2).mean()

    forward, both = flops(plain, student), flops(jax.grad(plain), student)
    actual, bare = (flops(asking(needs), student) for needs in (term.needs, Needs()))
    assert both > 2.5 * forward
    assert actual == bare < both + 1.2 * forward


@all_worlds
def test_x_t_is_on_the_teachers_trajectory_or_a_noised_latent(world):
    samples, steps = 32, 5
    with jax.enable_x64(True):
        batch, teacher = make_batch(samples, dtype=float), gaussian_params(dtype=float)
        batch = batch._replace(x0=batch.noise[::-1])

        @jax.jit
        def run(batch):
            context = world.context(Consistency(), batch, smooth_params(), None, teacher)
            t = uniform_angle(context)
            walked, noised = (Consistency(i, steps).latents(context, t) for i in (False, True))
            return t, walked, noised, add_noise(world.schedule, batch.x0, batch.noise, t)

        t, walked, noised, expected = jax.device_get(run(batch))
    np.testing.assert_array_equal(noised, expected)
    times = world.times[0] + np.linspace(0, 1, steps + 1)[:, None] * (t - world.times[0])
    jacobian, shift = gaussian_walk(teacher, world.schedule, times, guided_text(batch))
    expected = np.einsum("bij,bj->bi", jacobian, flat(batch.noise)) + shift
    np.testing.assert_allclose(flat(walked), expected, rtol=1e-6, atol=1e-6)
    assert Consistency(images=True).needs.images and not Consistency().needs.images


@all_worlds
def test_the_angle_is_uniform_up_to_the_students_first_time(world):
    samples = 4096
    batch, given = make_batch(samples), (smooth_params(), None, gaussian_params())
    t = jax.jit(lambda batch: uniform_angle(world.context(Consistency(), batch, *given)))(batch)
    t = np.asarray(t, float)
    ends = np.array([world.schedule.clean + 1, world.times[0]])
    assert t.min() >= ends[0] and t.max() <= ends[1]
    low, high = (np.arctan2(*world.schedule.alpha_sigma(v)[::-1]) for v in ends)
    share = np.sort((np.arctan2(*world.schedule.alpha_sigma(t)[::-1]) - low) / (high - low))
    # Kolmogorov's distance, below 1.95 / sqrt(n) in 999 cases of 1000.
    assert np.abs(share - (np.arange(samples) + 0.5) / samples).max() < 1.95 / samples**0.5


def test_a_uniform_angle_makes_the_update_shrink_the_error():
    """2 E<F - F*, g> = -E|F - F*|^2 - [cos a sin a E|F - F*|^2] between the ends, by parts."""
    world, samples = WORLDS["eps"], 16384
    with jax.enable_x64(True):
        teacher = gaussian_params(dtype=float)
        batch = make_batch(samples, dtype=float, text_scale=0.0)
        rng = np.random.default_rng(3)
        drawn = rng.normal(size=(samples, D)) * np.sqrt(teacher["variance"])
        x0 = np.asarray(teacher["mean"]) + drawn @ np.asarray(teacher["basis"]).T
        batch = batch._replace(x0=jnp.asarray(x0.reshape(samples, *SHAPE)))
        wrong = flow_map(teacher) | {"slope": 2 * teacher["variance"]}

        @jax.jit
        def run(batch):
            student_pred, real = predictors(world, batch, wrong, teacher)
            best, _ = predictors(world, batch, flow_map(teacher), teacher)

            def measure(t):
                x = add_noise(world.schedule, batch.x0, batch.noise, t)
                student_F, g = velocity_and_update(student_pred, real(x, t), world.schedule, x, t)
                error = student_F - velocity(best(x, t), *world.schedule.alpha_sigma(t))
                return sample_mean(error * g), sample_mean(error**2)

            context = world.context(Consistency(True), batch, wrong, None, teacher)
            ends = [jnp.full(samples, t) for t in (world.schedule.clean + 1, world.times[0])]
            return measure(uniform_angle(context)), [measure(t)[1].mean() for t in ends]

        (inner, square), edges = jax.device_get(run(batch))
    angles = np.array(
        [np.arctan2(*world.schedule.alpha_sigma(t)[::-1]) for t in (0.0, world.times[0])]
    )
    edge = np.diff(np.sin(2 * angles) / 2 * edges)[0] / np.diff(angles)[0]
    off = 2 * inner + square + edge
    print("2 <e, g>", 2 * inner.mean(), "-|e|^2", -square.mean(), "edges", -edge)
    assert abs(off.mean()) < 4 * off.std() / samples**0.5 < 0.05 * square.mean()


def map_error(world, student, teacher, samples=256):
    """Error of the one step from z, relative to the exact end of the teacher's ODE."""
    batch = make_batch(samples, seed=5, text_scale=0.0)
    start, end = (np.full(samples, t) for t in world.times)
    actual = jax.jit(world.denoiser)(student, batch.noise, jnp.float32(start), batch.cond).x0
    expected, _ = gaussian_map(teacher, world.schedule, flat(batch.noise), start, end, 0)
    return np.linalg.norm(flat(actual) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize(
    "total,bound",
    [
        (1.0 * Consistency(steps=4), 0.15),
        (Consistency(steps=4) + 0.3 * GAD(end="clean", steps=32, loss="square"), 0.15),
    ],
    ids=["alone", "with gad"],
)
def test_training_brings_the_one_step_map_to_the_teachers(kind, total, bound):
    world, teacher, updates, samples = WORLDS[kind], gaussian_params(), 500, 128
    sgd = optax.sgd(optax.cosine_decay_schedule(0.3, updates))

    def update(carry, i):
        student, state = carry
        batch = make_batch(samples, text_scale=0.0)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i), samples)
        noise = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)
        batch = batch._replace(key=keys, noise=noise)

        def loss(student):
            return total(world.context(total, batch, student, None, teacher))[0].mean()

        change, state = sgd.update(jax.grad(loss)(student), state)
        return (optax.apply_updates(student, change), state), None

    start = smooth_params()
    run = jax.jit(lambda s: jax.lax.scan(update, (s, sgd.init(s)), jnp.arange(updates))[0][0])
    before, after = (map_error(world, s, teacher) for s in (start, run(start)))
    print("error of the one-step map", before, "to", after)
    assert before > 0.9 and after < bound


def test_it_composes_in_a_world_of_four_steps():
    """With GAD and a critic; only the student is trained, and a weight of zero has no effect."""
    world = Smooth(DDPM_WORLD.schedule, "eps", DDPM_WORLD.times)
    total = Consistency() + 0.3 * GAD() + 0.5 * DMD()
    batch = make_batch(16)

    def loss(student, critic, teacher):
        loss_B, metrics = total(world.context(total, batch, student, critic, teacher))
        assert loss_B.shape == (16,) and loss_B.dtype == jnp.float32
        return loss_B.mean(), metrics

    run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    given = smooth_params(0.3), mixture_params(3), mixture_params(0)
    (student, critic, teacher), metrics = jax.device_get(run(*given))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((critic, teacher)))
    assert all(np.all(np.isfinite(v)) and np.any(v) for v in student.values())
    assert metrics["loss/consistency"] > 0 and metrics["consistency/tangent"] > 0
    assert (0.0 * Consistency() + DMD()).needs == DMD().needs


def test_refusals():
    with pytest.raises(InputError, match="objective.consistency.steps: found 0; expected 1"):
        build({"consistency": {"steps": 0}}, TERMS, DDPM_WORLD.times[:1])
    with pytest.raises(InputError, match="objective.consistency.warmup: found -1; expected 0 or"):
        build({"consistency": {"warmup": -1}}, TERMS, DDPM_WORLD.times[:1])
    with pytest.raises(InputError, match="objective.consistency.variance_bins: found -1; expected"):
        build({"consistency": {"variance_bins": -1}}, TERMS, DDPM_WORLD.times[:1])
    with pytest.raises(InputError, match="objective.consistency.variance_decay: found 1.0; expec"):
        build({"consistency": {"variance_decay": 1.0}}, TERMS, DDPM_WORLD.times[:1])
    with pytest.raises(InputError, match="objective.consistency: found 'ramp'; expected weight"):
        build({"consistency": {"ramp": 1}}, TERMS, DDPM_WORLD.times[:1])
    assert build({"consistency": {"images": True}}, TERMS, DDPM_WORLD.times[:1]).needs.images


def test_the_second_part_of_g_grows_over_the_warm_up():
    """r = min(1, step / warmup): at step 0 the loss draws F to the teacher's velocity alone."""
    world, batch = WORLDS["flow"], make_batch(8)
    nets = smooth_params(0.3), None, mixture_params()
    plain, term = Consistency(), Consistency(warmup=8)

    @jax.jit
    def run(step):
        context = replace(world.context(plain, batch, *nets), step=step)
        t_B = uniform_angle(context)
        x = plain.latents(context, t_B)
        student_pred, real = predictors(world, batch, nets[0], nets[2])
        given = student_pred, real(x, t_B), world.schedule, x, t_B
        parts = [velocity_and_update(*given, ramp)[1] for ramp in (0.0, None)]
        r = jnp.clip(step / 8, 0, 1)
        g = (1 - r) * parts[0] + r * parts[1]
        size = jnp.sqrt(sample_mean(g**2))
        expected = sample_mean((g / (size + 0.1)[:, None, None, None]) ** 2)
        return term(context)[0], expected, plain(context)[0]

    for step in (0, 2, 8, 100):
        actual, expected, full = run(jnp.int32(step))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
        assert np.allclose(actual, full, rtol=1e-5) == (step >= 8)


def test_the_variance_is_the_running_mean_of_the_loss_in_each_part_of_the_angle():
    """exp(-v) e + v in float64; v = log E[e] is the minimum, and the memory's fixed point."""
    world, samples, bins = WORLDS["flow"], 64, 3
    plain, term = Consistency(), Consistency(variance_bins=bins, variance_decay=0.75)
    with jax.enable_x64(True):
        batch, teacher = make_batch(samples, dtype=float), mixture_params(dtype=float)
        means = jnp.asarray([0.5, 2.0, 3.0])

        def context(student):
            made = world.context(term, batch, student, None, teacher)
            return replace(made, memory=means)

        def by_hand(student):
            given = context(student)
            alpha, sigma = world.schedule.alpha_sigma(uniform_angle(given))
            ends = [world.schedule.alpha_sigma(jnp.float64(t)) for t in (1, world.times[0])]
            low, high = (jnp.arctan2(s, a) for a, s in ends)
            part = jnp.floor((jnp.arctan2(sigma, alpha) - low) / (high - low) * bins)
            error = plain(given)[0]
            v = jnp.log(means)[part.astype(int)]
            return (jnp.exp(-v) * error + v).mean(), (part.astype(int), error)

        def ours(student):
            loss_B, metrics = term(context(student))
            return loss_B.mean(), metrics

        run = jax.jit(lambda s: [jax.value_and_grad(f, has_aux=True)(s) for f in (ours, by_hand)])
        (actual, expected) = jax.device_get(run(smooth_params(0.3, dtype=float)))
        (value, metrics), slope = actual
        (hand, (part, error)), right = expected
        memory = term.remember(means, metrics)
        for _ in range(200):
            memory = term.remember(memory, metrics)
        memory, after = jax.device_get((memory, term.remember(means, metrics)))
    for a, b in zip(jax.tree.leaves((value, slope)), jax.tree.leaves((hand, right)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * np.abs(b).max())
    assert set(part) == {0, 1, 2}
    once = [0.75 * m + 0.25 * error[part == k].mean() for k, m in enumerate((0.5, 2.0, 3.0))]
    np.testing.assert_allclose(after, once, rtol=1e-6)
    for k in range(bins):
        e = error[part == k]
        v = np.log(memory[k]) + np.linspace(-0.1, 0.1, 201)
        best = (np.exp(-v)[:, None] * e + v[:, None]).mean(1).argmin()
        assert best == 100
    assert plain.init_memory() is None and list(term.init_memory()) == [1, 1, 1]


def test_a_student_without_error_has_a_finite_loss():
    world, term = WORLDS["flow"], Consistency(variance_bins=2)
    batch, teacher = make_batch(8, text_scale=0.0), gaussian_params()
    context = world.context(term, batch, flow_map(teacher), None, teacher)
    loss_B, metrics = term(replace(context, memory=jnp.zeros(2)))
    assert np.isfinite(loss_B).all() and set(metrics) == {"tangent", "error_B", "bin_B"}


def test_its_tangent_uses_an_attention_with_a_jvp_rule():
    """With kernels a network has no tangent outside of a tangent pass."""
    passes = []

    def student(x, t_B):
        passes.append(tangent_pass.value)
        return Prediction(x, x)

    x = jnp.ones((2, 4, 4, 1))
    velocity_and_update(student, Prediction(x, x), DDPM(), x, jnp.full(2, 500.0))
    assert passes == [True]
