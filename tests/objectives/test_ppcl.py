import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, flow_first, gaussian_params, make_batch, one_step
from formula_terms import compare, pictures, with_features

from gadjax.objectives import PPCL
from gadjax.objectives.ppcl import last_layers, unit
from gadjax.training.context import Roles, make_context

LAYERS = (0, 2)  # of three


def with_layers(world):
    world = with_features(world)
    plain = world.step_spec
    object.__setattr__(
        world, "step_spec", lambda term, **more: plain(term, student_layers=LAYERS, **more)
    )
    return world


def formula(images):
    def loss(hand):
        """The student's layers 0 and 1 stand for the teacher's up to 1 and up to 2."""
        cond, x_t, t = hand.batch.cond, hand.context.x_BHWC, hand.context.t_B
        if images:
            t = hand.uniform_times(0, 1)
            x_t = hand.noised(hand.batch.x0, t)
        features = hand.world.denoiser.features
        teacher = features(hand.context.networks["ppcl/teacher"], x_t, t, cond, blocks=(1, 2))
        total = 0.0
        for a, b in zip(features(hand.student, x_t, t, cond, blocks=(0, 1)), teacher, strict=True):
            norms = [jnp.sqrt((h**2).sum(-1)) for h in (a, b)]
            cosine = (a * jax.lax.stop_gradient(b / norms[1][..., None])).sum(-1) / norms[0]
            total += (2 - 2 * cosine).mean(1)  # |u - v|^2 of unit vectors
        return total

    return loss


@flow_first
@pytest.mark.parametrize("images", [True, False], ids=["pictures", "drawn steps"])
def test_losses_and_gradients_are_those_of_the_formula(world, images):
    with jax.enable_x64(True):
        networks = {"ppcl/teacher": gaussian_params(6, dtype=float)}
    term, x0 = PPCL(images=images), pictures(float)
    world = one_step(world) if images else world
    compare(with_layers(world), term, formula(images), x0=x0, networks=networks)


def test_each_layer_stands_for_those_that_were_removed_behind_it():
    assert last_layers((0, 1, 2), 3) == (0, 1, 2)
    assert last_layers((0, 3, 4), 9) == (2, 3, 8) and last_layers((5,), 9) == (8,)


def test_directions_alone_are_compared():
    tokens = np.random.default_rng(0).normal(size=(2, 3, 4))
    np.testing.assert_allclose(unit(tokens), unit(7 * tokens), rtol=1e-6)
    assert unit(np.zeros((1, 1, 4))).tolist() == [[[0, 0, 0, 0]]]


def test_it_leaves_open_how_the_student_is_sampled():
    assert not PPCL().needs.uses_teacher and not PPCL().needs.is_few_step
    assert PPCL().needs.fewer_layers and FLOW_WORLD.step_spec(PPCL()).student_layers == ()


def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient():
    world, teacher = with_features(one_step(FLOW_WORLD)), gaussian_params(6)
    batch, term = make_batch(8)._replace(x0=pictures()), PPCL()
    step_spec = world.step_spec(term, student_layers=(0, 1, 2))

    @jax.jit
    def run(student):
        def loss(student):
            roles = Roles(student, networks={"ppcl/teacher": teacher})
            return term(make_context(step_spec, term.needs, roles, batch))[0].mean()

        return jax.value_and_grad(loss)(student)

    value, slopes = run(teacher)
    assert value < 1e-9 and max(np.abs(x).max() for x in jax.tree.leaves(slopes)) < 1e-5
    value, slopes = run(gaussian_params(7))
    assert value > 0.1 and max(np.abs(x).max() for x in jax.tree.leaves(slopes)) > 1e-2
