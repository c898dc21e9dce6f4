from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import GUIDANCE, SHAPE, flow_first, make_batch, mixture_params

from gadjax.analytic.bench import Bench
from gadjax.analytic.teachers import Mixture
from gadjax.errors import InputError
from gadjax.objectives import GAD, TERMS, TSCD, Anchor, build
from gadjax.training.context import Roles, make_context

sg = jax.lax.stop_gradient
SAMPLES = 24


def by_hand(world, term, context, student, target, teacher, k):
    """The paper's loss in the segment of t, of k; each network's jump is a DDIM step."""
    batch, schedule = context.batch, world.schedule
    edges = np.linspace(schedule.clean, world.times[0], k + 1)
    width = (world.times[0] - schedule.clean) / term.points
    r = schedule.clean + jnp.floor(context.uniform("t") * term.points) * width
    t = r + width
    below = np.searchsorted(edges, np.asarray(r) + 1e-6) - 1  # the segment that has r and t
    s = jnp.asarray(edges)[below]

    def levels(time):
        return [v[:, None, None, None] for v in schedule.alpha_sigma(time)]

    def jump(params, x, time, cond, to):
        x0, eps = world.denoiser(params, x, time, cond)
        return levels(to)[0] * x0 + levels(to)[1] * eps

    x_t = levels(t)[0] * batch.x0 + levels(t)[1] * batch.noise
    cond, null = (jump(teacher, x_t, t, c, r) for c in (batch.cond, batch.null))
    x_r = null + GUIDANCE * (cond - null)
    inside = (r > s + 1e-6)[:, None, None, None]
    goal = jump(target, x_r, jnp.where(r < schedule.clean + 1, 500.0, r), batch.cond, s)
    error = jump(student, x_t, t, batch.cond, s) - sg(jnp.where(inside, goal, x_r))
    return (error**2).mean((1, 2, 3)), inside


@pytest.mark.parametrize(
    "share,k,target", [(0.2, 4, "student"), (1.0, 1, "ema")], ids=["first", "last"]
)
@flow_first
def test_loss_and_gradient_are_those_of_the_formula(world, share, k, target):
    term = TSCD((4, 2, 1), points=12, target=target)
    with jax.enable_x64(True):
        pictures = np.random.default_rng(5).normal(size=(SAMPLES, *SHAPE))
        batch = make_batch(SAMPLES, dtype=float)._replace(x0=jnp.asarray(pictures))
        student, ema = (world.student_params(seed, bend=0.4, dtype=float) for seed in (1, 2))
        teacher = mixture_params(dtype=float)

        def context(student, ema, teacher):
            roles = Roles(student, teacher, ema=ema)
            context = make_context(world.step_spec(term), term.needs, roles, batch)
            return replace(context, share=share)

        def ours(*nets):
            loss_B = term(context(*nets))[0]
            return loss_B.mean(), loss_B

        def theirs(student, ema, teacher):
            goal = ema if target == "ema" else student
            given = world, term, context(student, ema, teacher)
            loss_B, inside = by_hand(*given, student, goal, teacher, k)
            return loss_B.mean(), (loss_B, inside)

        nets = student, ema, teacher
        (_, loss_B), slopes = jax.value_and_grad(ours, (0, 1, 2), has_aux=True)(*nets)
        formula, formula_slopes = jax.value_and_grad(theirs, (0, 1, 2), has_aux=True)(*nets)
    formula_B, inside = formula[1]
    np.testing.assert_allclose(loss_B, formula_B, rtol=1e-10)
    for a, b in zip(*map(jax.tree.leaves, (slopes, formula_slopes)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(slopes[0])) > 1e-3
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes[1:]))  # stop-gradiented
    assert 0 < np.mean(inside) < 1  # both kinds of target


def test_segments_by_the_clock():
    term, points = TSCD(points=16), np.arange(16)
    for share, k in ((0.0, 8), (0.24, 8), (0.26, 4), (0.5, 2), (0.74, 2), (0.76, 1), (1.0, 1)):
        end = term.segment_end(type("Clock", (), {"share": jnp.float32(share)}), points)
        np.testing.assert_array_equal(end, points // (16 // k) * (16 // k))


@pytest.mark.slow
@pytest.mark.parametrize("steps,segments", [(1, (8, 4, 2, 1)), (4, (8, 4))])
def test_it_learns_the_teachers_map_in_its_steps(steps, segments):
    bench = Bench(Mixture.ring(), "flow", steps)
    start = bench.measure(bench.draw, bench.init(jax.random.key(0)))
    result = bench.fit(TSCD(segments=segments), 1000)
    assert result.transport_cost < 0.5 * start.transport_cost


def test_it_combines_with_gad_and_an_anchor_and_needs_no_pictures():
    total = build({"tscd": {"images": False}, "gad": {}, "anchor": {}}, TERMS, (899.0, 449.0))
    assert not total.needs.images and total.needs.teacher
    assert (TSCD() + GAD() + Anchor()).needs.images


@pytest.mark.parametrize(
    "options,message",
    [
        ({"target": "teacher"}, "objective.tscd.target: found 'teacher'; expected"),
        ({"points": 1}, "objective.tscd.points: found 1; expected 2 or more"),
        ({"steps": 0}, "objective.tscd.steps: found 0; expected 1 or more"),
        ({"segments": ()}, r"objective.tscd.segments: found \(\); expected numbers"),
        ({"segments": (8, 5)}, r"objective.tscd.segments: found \(8, 5\); expected .* 48 points"),
        ({"segments": (8, 0)}, r"objective.tscd.segments: found \(8, 0\); expected"),
        ({"segments": (8, "2")}, "objective.tscd.segments: found"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        TSCD(**options)


def test_segments_that_are_not_the_students_steps_are_refused():
    with pytest.raises(InputError, match="segments: found 4 at the end; expected 1 or .* 2 steps"):
        build({"tscd": {"segments": [8, 4]}}, TERMS, (899.0, 449.0))
    for times in ((899.0, 449.0), (999.0, 499.5), (1.5708, 0.7854)):
        build({"tscd": {"segments": [8, 2]}}, TERMS, times)
    with pytest.raises(InputError, match="student.timesteps: found .*; expected even ones"):
        build({"tscd": {"segments": [8, 2]}}, TERMS, (899.0, 300.0))
