import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    flow_first,
    gaussian_params,
    make_batch,
    perfect_student,
)
from formula_terms import SAMPLES, World, mixture_params

from gadjax.diffusion.rollout import interpolate_times, rollout
from gadjax.errors import InputError
from gadjax.objectives import TERMS, SeedDifference, build
from gadjax.objectives.comparisons.seed_difference import mean_over_cells


@pytest.mark.parametrize("steps,cells", [(1, 1), (3, 2)])
@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world, steps, cells):
    """In float64; the second noise's latent is where the student's own steps lead."""
    # From a flow's last time, the teacher's x0 in one step is the same for all noises.
    world = World(world.schedule, world.kind, (world.times[0] - 20, *world.times[1:]))
    term = SeedDifference(steps, cells)

    def by_hand(student, teacher, batch):
        context = world.context(term, batch, student, None, teacher)
        x, walk, times = context.normal("other"), [], jnp.asarray(world.times)
        for start, stop in zip(times[:-1], times[1:], strict=True):
            walk.append(x)
            given = world.denoiser(student, x, jnp.full(SAMPLES, start), batch.cond)
            (a, s), (b, r) = (world.schedule.alpha_sigma(t) for t in (start, stop))
            x = r / s * x + (b - r / s * a) * given.x0
        y = jax.lax.stop_gradient(jnp.stack(walk)[context.step_B, np.arange(SAMPLES)])

        def clean(x):
            ends = jnp.full_like(context.t_B, world.schedule.clean)
            grid = interpolate_times(context.t_B, ends, steps)
            return rollout(context.teacher, world.schedule, x, grid).end

        def x0(x):
            return world.denoiser(student, x, context.t_B, batch.cond).x0

        now, real = x0(context.x_BHWC) - x0(y), clean(context.x_BHWC) - clean(y)
        if cells == 1:
            now, real = (v.mean((1, 2)) for v in (now, real))
        a, b = (v.reshape(SAMPLES, -1) for v in (now, jax.lax.stop_gradient(real)))
        cosine = (a * b).sum(1) / jnp.linalg.norm(a, axis=1) / jnp.linalg.norm(b, axis=1)
        return jnp.where(context.step_B < 3, np.float32(4 / 3) * (1 - cosine), 0)

    def ours(student, teacher, batch):
        return term(world.context(term, batch, student, None, teacher))[0]

    @jax.jit
    def run(*given):
        means = [jax.grad(lambda *now, f=f: f(*now).mean(), (0, 1)) for f in (ours, by_hand)]
        return [(f(*given), slope(*given)) for f, slope in zip((ours, by_hand), means, strict=True)]

    with jax.enable_x64(True):
        given = world.student_params(bend=0.4, dtype=float), mixture_params(dtype=float)
        actual, expected = jax.device_get(run(*given, make_batch(SAMPLES, dtype=float)))
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    student, teacher = expected[1]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(teacher))
    assert all(np.abs(student[f"step{k}"]["matrix"]).max() > 1e-4 for k in range(3))


def test_no_loss_where_the_student_is_the_teacher():
    world, term = DDPM_WORLD, SeedDifference(cells=2)
    teacher, batch = gaussian_params(), make_batch(16, text_scale=0.0)
    same = perfect_student(world, teacher, 1)
    zero, other = (
        world.losses(term)(batch, student, None, teacher)
        for student in (same, world.student_params())
    )
    assert np.abs(zero[0]).max() < 1e-5 < 0.1 < np.abs(other[0]).mean()
    np.testing.assert_allclose(zero[1]["cosine"], 1, rtol=1e-5)


@pytest.mark.parametrize("sides,cells", [((8, 6), 4), ((4, 4), 2), ((3, 5), 16)])
def test_cells_are_averaged(sides, cells):
    x = np.random.default_rng(0).normal(size=(2, *sides, 3))
    rows, columns = (
        [np.arange(s) * min(cells, s) // s == i for i in range(min(cells, s))] for s in sides
    )
    expected = np.stack([[x[:, r][:, :, c].mean((1, 2)) for c in columns] for r in rows])
    with jax.enable_x64(True):
        actual = mean_over_cells(jnp.asarray(x), cells)
    np.testing.assert_allclose(np.moveaxis(expected, 2, 0), actual, rtol=1e-12)


def test_bad_options():
    with pytest.raises(InputError, match="^objective.seed_difference.steps: found 0; expected 1"):
        SeedDifference(0)
    with pytest.raises(InputError, match="^student.steps: found 1; expected at least 2, because"):
        build({"seed_difference": {}}, TERMS, (999.0,))
    with pytest.raises(InputError, match="found a loss of the student's next latent"):
        build({"seed_difference": {}}, TERMS, FLOW_WORLD.times[:-1], "fresh_noise")
