import jax
import numpy as np
from closed_form import (
    WORLDS,
    D,
    all_worlds,
    gaussian_params,
    gaussian_walk,
    guided_text,
    later_steps,
    make_batch,
    perfect_student,
)

from gadjax.objectives import Anchor, Regression
from gadjax.training.backward_simulation import stratified_step_indices


@all_worlds
def test_zero_at_the_teachers_map_with_zero_gradient(world):
    batch, teacher, term = make_batch(32, text_scale=0.0), gaussian_params(), Regression(steps=5)

    def loss(student):
        return term(world.context(term, batch, student, None, teacher))[0].mean()

    run, right = jax.jit(jax.value_and_grad(loss)), perfect_student(world, teacher, 5)
    value, slope = run(right)
    assert float(value) < 1e-9
    other = {k: v | {"bias": v["bias"] + 0.1} for k, v in right.items()}
    worse, steep = run(other)
    assert float(worse) > 1e-4
    for small, large in zip(*map(jax.tree.leaves, (slope, steep)), strict=True):
        assert np.abs(small).max() < 1e-3 * np.abs(large).max()


@all_worlds
def test_to_the_clean_end_it_is_the_distance_of_x0_to_the_end_of_the_ode(world):
    samples, term = 16, Regression("clean", 7)
    student, teacher = world.student_params(), gaussian_params()

    @jax.jit
    def run(batch, student, teacher):
        context = world.context(term, batch, student, None, teacher)
        return term(context)[0], context.x_BHWC, context.student[0].x0

    batch = make_batch(samples)
    loss_B, x, student_x0 = jax.device_get(run(batch, student, teacher))
    x, student_x0 = (v.reshape(samples, D).astype(float) for v in (x, student_x0))
    start = np.array(world.times)[stratified_step_indices(np.arange(samples), 4)]
    times = start + np.linspace(0, 1, 8)[:, None] * (world.times[-1] - start)
    jacobian, shift = gaussian_walk(teacher, world.schedule, times, guided_text(batch))
    expected = np.einsum("bij,bj->bi", jacobian, x) + shift
    np.testing.assert_allclose(loss_B, ((student_x0 - expected) ** 2).mean(1), rtol=1e-4)


def test_the_anchors_step_has_no_weight():
    world, batch, term = WORLDS["flow"], make_batch(16), 1.0 * Regression()
    student, teacher = world.student_params(), gaussian_params()

    @jax.jit
    def run(student):
        masked = world.context(term + Anchor(), batch, student, None, teacher)
        return term(masked)[0], term(world.context(term, batch, student, None, teacher))[0]

    masked, plain = jax.device_get(run(student))
    np.testing.assert_allclose(masked, plain * later_steps(16), rtol=1e-5)
