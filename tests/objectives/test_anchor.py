from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    GUIDANCE,
    D,
    World,
    all_worlds,
    flat,
    gaussian_params,
    gaussian_walk,
    guided_text,
    make_batch,
    mixture_params,
)
from several import run_on_devices

from gadjax.diffusion.geometry import Directions
from gadjax.errors import InputError
from gadjax.objectives import DMD, TERMS, Anchor, Needs, Sum, TeacherMap, build
from gadjax.objectives.anchor import secant
from gadjax.objectives.base import sample_mean
from gadjax.objectives.compose import Addable
from gadjax.ops.flops import flops
from gadjax.parallel.sharding import batch_sharding, make_mesh, replicated
from gadjax.training.backward_simulation import stratified_step_indices
from gadjax.training.state import create_state
from gadjax.training.steps import student_step

B = 12


def walked(world, batch, teacher, steps):
    """z, the end of the teacher's first interval from it, and T_w there; in float64."""
    z, text = flat(batch.noise), guided_text(batch)
    times = np.linspace(world.times[0], world.times[1], steps + 1)
    times = np.broadcast_to(times[:, None], (steps + 1, len(z)))
    jacobian, shift = gaussian_walk(teacher, world.schedule, times, text)
    arrived = np.einsum("bij,bj->bi", jacobian, z) + shift
    alpha, sigma = world.schedule.alpha_sigma(np.array(world.times[1]))
    mean, basis, variance = (np.asarray(teacher[k], float) for k in ("mean", "basis", "variance"))
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    mean = mean + text
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
    first = stratified_step_indices(np.arange(B), 4) == 0
    # Four steps share the batch, and the mean over it is to be that over the first one's samples.
    np.testing.assert_allclose(loss_B, np.where(first, 4 * expected, 0), rtol=1e-4)


def flat_text(batch):
    return np.asarray(batch.cond.text[:, 0], float)


@all_worlds
def test_the_x0_target_is_the_teachers_prediction_at_the_end_of_its_map(world):
    batch, student, teacher = make_batch(B), world.student_params(), gaussian_params()
    loss_B, _ = world.losses(Anchor("x0", steps=3))(batch, student, None, teacher)
    z, _, target = walked(world, batch, teacher, 3)
    step = jax.tree.map(lambda v: np.asarray(v, float), student["step0"])
    x0 = z @ step["matrix"].T + step["bias"] + flat_text(batch)
    expected = ((x0 - target) ** 2).mean(1)
    first = stratified_step_indices(np.arange(B), 4) == 0
    np.testing.assert_allclose(loss_B, np.where(first, 4 * expected, 0), rtol=1e-4)


@all_worlds
def test_the_secants_path_passes_through_both_ends(world):
    """A student with that prediction steps onto the teacher's trajectory."""
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


@all_worlds
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
    """A term that needs the student's full rollout, as DMD through all steps does, or the full map
    with tangents, as GAD does."""

    kind: str = "endpoint"

    @property
    def needs(self):
        tangent = Directions() if self.kind == "tangent" else None
        return Needs(endpoint=self.kind == "endpoint", full_map=bool(tangent), tangent=tangent)

    def __call__(self, context):
        end = context.endpoint if self.needs.endpoint else context.full_map[0]
        return 0 * sample_mean(end), {}


def slopes(world, term, batch, **more):
    """The loss of each sample and the student's gradient of their mean."""
    teacher, student = gaussian_params(), world.student_params(bend=0.2)

    def loss(student):
        loss_B = term(world.context(term, batch, student, None, teacher, **more))[0]
        return loss_B.mean(), loss_B

    (_, loss_B), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    return jax.device_get((loss_B, slope))


@all_worlds
@pytest.mark.parametrize("kind", ["endpoint", "tangent"])
@pytest.mark.parametrize("anchor", [Anchor(steps=2), Anchor("x0", steps=2, until=700.0)])
def test_with_a_full_rollout_all_samples_train_the_first_step(world, kind, anchor):
    """Like samples whose drawn step is the first, which have weight 4."""
    batch = make_batch(B)
    first = batch._replace(stratum=jnp.zeros_like(batch.stratum))
    alone, combined = (
        slopes(world, anchor, first, batch_shards=B),
        slopes(world, anchor + End(kind), batch),
    )
    for one, other in zip(*map(jax.tree.leaves, (alone, combined)), strict=True):
        np.testing.assert_allclose(one / 4, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("combined", [(), (End(),)], ids=["drawn", "all"])
def test_two_anchors_have_separate_maps(combined):
    batch, terms = make_batch(B), (Anchor(steps=2), Anchor("x0", steps=3, until=700.0))
    one, two = (slopes(FLOW_WORLD, Sum(()) + sum(combined, term), batch)[0] for term in terms)
    both, _ = slopes(FLOW_WORLD, sum(combined, terms[0] + 0.5 * terms[1]), batch)
    np.testing.assert_allclose(both, one + 0.5 * two, rtol=1e-5, atol=1e-6)


def test_all_samples_give_the_same_mean_at_a_quarter_of_the_variance():
    """Over 4096 batches of 8, in which a drawn step is the first for 2."""
    batch = make_batch(4096 * 8)
    alone, combined = (
        slopes(FLOW_WORLD, term, batch)[0].reshape(4096, 8).astype(float).mean(1)
        for term in (Anchor(steps=2), Anchor(steps=2) + End())
    )
    error = (alone - combined).std() / 4096**0.5
    assert abs(alone.mean() - combined.mean()) < 3 * error < 0.05 * combined.mean()
    ratio = alone.var() / combined.var()
    print(f"variance at drawn first steps / with all samples: {ratio:.2f}")
    assert 3.5 < ratio < 4.5


DPDMD = DMD(backprop="all") + 0.05 * Anchor(steps=2)
PLAIN = {"student": optax.sgd(1.0), "critic": optax.sgd(1.0)}


@dataclass(frozen=True)
class Landing(Addable):
    """A term that needs the anchor's map too, which is then computed once, at the drawn step."""

    needs = Needs(maps=(Anchor(steps=2).map,))

    def __call__(self, context):
        return 0 * sample_mean(context.maps[Anchor(steps=2).map][0]), {}


def test_a_map_shared_with_another_term_is_computed_once():
    batch = make_batch(B)
    alone, total = Anchor(steps=2), Anchor(steps=2) + Landing() + End()
    for one, other in zip(
        *(jax.tree.leaves(slopes(FLOW_WORLD, term, batch)) for term in (alone, total)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_dpdmds_update_costs_no_more_for_four_times_the_samples():
    batch = make_batch(B)
    params = {"student": FLOW_WORLD.student_params(), "critic": gaussian_params(3)}

    def cost(total):
        step_spec = FLOW_WORLD.step_spec(total, optimizers=PLAIN)
        state = create_state(params, PLAIN)
        return flops(partial(student_step, step_spec), state, {"teacher": gaussian_params()}, batch)

    all_of, some, none = cost(DPDMD), cost(DPDMD + Landing()), cost(DMD(backprop="all"))
    useful = np.sum(np.asarray(stratified_step_indices(batch.stratum, 4)) == 0)
    per = (all_of - none) / B, (some - none) / useful
    print(f"operations of the anchor per sample that trains it: {per[1]:.0f} -> {per[0]:.0f}")
    assert none < all_of <= some and per[0] <= per[1] / 4


def moves(mesh, **more):
    """Change of the student by plain gradient steps, and its losses."""
    params = {"student": FLOW_WORLD.student_params(bend=0.2), "critic": gaussian_params(3)}
    step_spec = FLOW_WORLD.step_spec(DPDMD, optimizers=PLAIN, batch_shards=mesh.size, **more)
    state = jax.device_put(create_state(params, PLAIN), replicated(mesh))
    batch = jax.device_put(make_batch(16), batch_sharding(mesh))
    new, metrics = jax.jit(partial(student_step, step_spec))(
        state, {"teacher": gaussian_params()}, batch
    )
    return jax.device_get((new.params["student"], metrics))


def assert_close(one, other):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def worker():
    """On eight devices, with and without microbatches, the update equals that on one."""
    one = moves(make_mesh({"data": 1}, jax.devices()[:1]))
    assert float(one[1]["loss/anchor"]) > 0.1
    assert_close(moves(make_mesh({"data": 1}, jax.devices()[:1]), microbatches=4), one)
    for microbatches in (1, 2):
        assert_close(moves(make_mesh({"data": 8}), microbatches=microbatches), one)


def test_dpdmds_update_on_eight_devices_and_in_microbatches():
    run_on_devices(8, __file__)


def test_a_first_step_on_the_teachers_trajectory_has_no_loss():
    """K with the student's own end of the first interval makes the anchor a plain regression."""
    world, steps, batch, teacher = DDPM_WORLD, 6, make_batch(B, text_scale=0.0), gaussian_params()
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
    build(config, TERMS, DDPM_WORLD.times[:2])
    with pytest.raises(InputError, match="student.steps: found 1; expected at least 2"):
        build(config, TERMS, DDPM_WORLD.times[:1])


def test_unknown_target():
    with pytest.raises(InputError, match="objective.anchor.target: found 'eps'"):
        Anchor("eps")


def test_guidance_is_in_the_target():
    """The same student is not the anchor's at another guidance scale."""
    world = World(FLOW_WORLD.schedule, "flow", (1000.0, 500.0, 0.0))
    batch, student, teacher = make_batch(B), world.student_params(), gaussian_params()
    actual = [
        np.asarray(world.losses(Anchor(), guidance=w)(batch, student, None, teacher)[0])
        for w in (1, GUIDANCE)
    ]
    actual = np.array(actual)[:, stratified_step_indices(np.arange(B), 2) == 0]
    assert np.abs(actual[0] - actual[1]).min() > 1e-3


@pytest.mark.parametrize("until", [1000.0, 1200, 0, -1.0])
def test_an_end_outside_the_students_trajectory(until):
    words = f"objective.anchor.until: found {until}; expected a time between 0 and 1000.0"
    with pytest.raises(InputError, match=words):
        build({"anchor": {"until": until}}, TERMS, FLOW_WORLD.times[:-1])


if __name__ == "__main__":
    worker()
