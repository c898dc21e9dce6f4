from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    GUIDANCE,
    WORLDS,
    D,
    World,
    gaussian_params,
    gaussian_walk,
    guided_text,
    make_batch,
    mixture_params,
)

from gadjax.errors import InputError
from gadjax.objectives import TERMS, Anchor, Needs, TeacherMap, build
from gadjax.objectives.anchor import secant
from gadjax.objectives.base import sample_mean
from gadjax.objectives.compose import Addable
from gadjax.training.steps import drawn_steps, make_context

each_world = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
B = 12


def flat(x):
    return np.asarray(x, float).reshape(len(x), D)


def walked(world, batch, teacher, steps):
    """z, where the teacher's first interval leads from it, and T_w there; in float64."""
    z, told = flat(batch.noise), guided_text(batch)
    times = np.linspace(world.times[0], world.times[1], steps + 1)
    times = np.broadcast_to(times[:, None], (steps + 1, len(z)))
    jacobian, shift = gaussian_walk(teacher, world.schedule, times, told)
    arrived = np.einsum("bij,bj->bi", jacobian, z) + shift
    alpha, sigma = world.schedule.alpha_sigma(np.array(world.times[1]))
    mean, basis, variance = (np.asarray(teacher[k], float) for k in ("mean", "basis", "variance"))
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    mean = mean + told
    return z, arrived, mean + ((arrived - alpha * mean) @ basis * gain) @ basis.T


def test_in_a_flow_the_target_is_the_secants_velocity():
    """mean |v_S - (z - z_k) / (t_1 - t_k)|^2 with times in units of sigma."""
    world, batch = FLOW_WORLD, make_batch(B)
    student, teacher = world.student_params(), gaussian_params()
    loss_B, _ = world.losses(Anchor(steps=5))(batch, student, None, teacher)
    z, arrived, _ = walked(world, batch, teacher, 5)
    step = jax.tree.map(lambda v: np.asarray(v, float), student["step0"])
    x0 = z @ step["matrix"].T + step["bias"] + flat_text(batch)
    velocity = z - x0  # at sigma = 1 eps is z itself
    target = (z - arrived) / ((world.times[0] - world.times[1]) / 1000)
    expected = ((velocity - target) ** 2).mean(1)
    first = drawn_steps(np.arange(B), 4) == 0
    # Four steps share the batch, and the mean over it is to be that over the first one's samples.
    np.testing.assert_allclose(loss_B, np.where(first, 4 * expected, 0), rtol=1e-4)


def flat_text(batch):
    return np.asarray(batch.cond.text[:, 0], float)


@each_world
def test_the_x0_target_is_what_the_teacher_sees_at_the_end_of_its_walk(world):
    batch, student, teacher = make_batch(B), world.student_params(), gaussian_params()
    loss_B, _ = world.losses(Anchor("x0", steps=3))(batch, student, None, teacher)
    z, _, target = walked(world, batch, teacher, 3)
    step = jax.tree.map(lambda v: np.asarray(v, float), student["step0"])
    x0 = z @ step["matrix"].T + step["bias"] + flat_text(batch)
    expected = ((x0 - target) ** 2).mean(1)
    first = drawn_steps(np.arange(B), 4) == 0
    np.testing.assert_allclose(loss_B, np.where(first, 4 * expected, 0), rtol=1e-4)


@each_world
def test_the_secants_path_passes_through_both_ends(world):
    """So that a student which says it steps onto the teacher's own trajectory."""
    batch, student, teacher = make_batch(B), world.student_params(), mixture_params()

    @jax.jit
    def run(batch, student, teacher):
        term = Anchor(steps=4)
        context = world.context(term, batch, student, None, teacher)
        arrived = context.maps[TeacherMap("next", 4)][0]
        ends = []
        for t in (context.t_B, context.next_B):
            alpha, sigma = (v[:, None, None, None] for v in world.schedule.alpha_sigma(t))
            x0, eps = secant(context, arrived, context.next_B)
            ends.append(alpha * x0 + sigma * eps)
        return context.x_BHWC, arrived, ends

    x, arrived, (start, end) = jax.device_get(run(batch, student, teacher))
    np.testing.assert_allclose(start, x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(end, arrived, rtol=1e-4, atol=1e-4)


@each_world
@pytest.mark.parametrize("target", ["v", "x0"])
def test_it_trains_the_first_step_alone_and_towards_the_teacher(world, target):
    batch, teacher, term = make_batch(256), gaussian_params(), Anchor(target)

    def loss(student, teacher):
        return term(world.context(term, batch, student, None, teacher))[0].mean()

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    student = world.student_params(bend=0.2)
    before, (slope, by_teacher) = run(student, teacher)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(by_teacher))
    for k in (1, 2, 3):
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(slope[f"step{k}"]))
    for leaf in jax.tree.leaves(slope["step0"]):
        assert np.all(np.asarray(leaf) != 0)
    for _ in range(20):
        student = jax.tree.map(lambda p, g: p - 0.1 * g, student, slope)
        after, (slope, _) = run(student, teacher)
    assert float(after) < 0.7 * float(before)


@dataclass(frozen=True)
class End(Addable):
    """Asks for the student's rollout to the end, as DMD through the whole of it does."""

    needs = Needs(endpoint=True)

    def __call__(self, context):
        return 0 * sample_mean(context.endpoint), {}


@each_world
def test_where_the_student_walks_to_the_end_its_first_step_is_taken_from_there(world):
    batch, teacher, student = make_batch(B), gaussian_params(), world.student_params(bend=0.2)

    def loss(term, student):
        return term(world.context(term, batch, student, None, teacher))[0].mean()

    def calls(term):
        asked = []
        seen = replace(
            world.denoiser, apply=lambda *given: asked.append(0) or world.denoiser.apply(*given)
        )
        counting = replace(world.recipe(term), denoiser=seen)

        def loss(student):
            return term(make_context(counting, term.needs, student, None, teacher, batch))[0]

        jax.eval_shape(loss, student)
        return len(asked)

    alone, total = Anchor(steps=2), Anchor(steps=2) + End()
    found = [jax.jit(jax.value_and_grad(partial(loss, term)))(student) for term in (alone, total)]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    # The walk to the drawn step, that step, and the teacher's map with and without the caption.
    assert calls(total) == calls(alone) - 1


def test_a_first_step_on_the_teachers_trajectory_has_no_loss():
    """K with the student's own end of the first interval makes the anchor a plain regression."""
    world, steps, batch, teacher = DDPM_WORLD, 6, make_batch(B, told=0.0), gaussian_params()
    times = np.linspace(world.times[0], world.times[1], steps + 1)[:, None]
    jacobian, shift = (v[0] for v in gaussian_walk(teacher, world.schedule, times, 0))
    (a, b), (s, r) = world.schedule.alpha_sigma(np.array(world.times[:2]))
    student = world.student_params()
    student["step0"] = {
        "matrix": jnp.float32((jacobian - r / s * np.eye(D)) / (b - r / s * a)),
        "bias": jnp.float32(shift / (b - r / s * a)),
        "bend": jnp.zeros(D),
    }
    run = world.losses(Anchor(steps=steps))
    assert float(run(batch, student, None, teacher)[0].max()) < 1e-6
    moved = student | {"step0": student["step0"] | {"bias": student["step0"]["bias"] + 0.1}}
    assert float(run(batch, moved, None, teacher)[0].max()) > 1e-3


def test_one_step_leaves_nothing_for_the_base():
    config = {"anchor": {"weight": 0.05}, "dmd": {}}
    build(config, TERMS, 2)
    with pytest.raises(InputError, match="student.steps: found 1; expected at least 2"):
        build(config, TERMS, 1)


def test_unknown_target():
    with pytest.raises(InputError, match="objective.anchor.target: found 'eps'"):
        Anchor("eps")


def test_guidance_is_in_the_target():
    """The same student is not the anchor's at another guidance scale."""
    world = World(FLOW_WORLD.schedule, "flow", (1000.0, 500.0, 0.0))
    batch, student, teacher = make_batch(B), world.student_params(), gaussian_params()
    found = [
        np.asarray(world.losses(Anchor(), guidance=w)(batch, student, None, teacher)[0])
        for w in (1, GUIDANCE)
    ]
    found = np.array(found)[:, drawn_steps(np.arange(B), 2) == 0]
    assert np.abs(found[0] - found[1]).min() > 1e-3
