import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, GUIDANCE, flow_first, gaussian_params, make_batch, one_step
from formula_terms import SAMPLES, compare, with_features

from gadjax.diffusion.rollout import interpolate_times, rollout
from gadjax.errors import InputError
from gadjax.objectives import DMM, TERMS, build
from gadjax.training.context import Roles, make_context

sg = jax.lax.stop_gradient
LABEL = np.array([0, 1, 1, 0, 2, 1, 0, 2])
TEACHERS = ("a", "b", "c")


def networks(dtype=float):
    return {f"dmm/{i}": gaussian_params(20 + i, dtype=dtype) for i in range(3)}


def versions(dtype=float):
    other = make_batch(SAMPLES, seed=9, dtype=dtype).cond
    return {"override": other, "label": jnp.asarray(LABEL, jnp.int32)}


def formula(blocks=()):
    def loss(hand):
        """A sample at a time, its teacher alone: the point of its rollout, and both outputs."""
        batch, t = hand.batch, hand.uniform_times(0, 1)
        total = []
        for i, label in enumerate(LABEL):
            params = hand.context.networks[f"dmm/{label}"]
            (text, null, own) = (
                jax.tree.map(lambda x, i=i: x[i : i + 1], c)
                for c in (batch.override, batch.null, batch.cond)
            )

            def guided(x, t, params=params, text=text, null=null):
                halves = [hand.world.denoiser(params, x, t, c) for c in (text, null)]
                return jax.tree.map(lambda c, n: n + GUIDANCE * (c - n), *halves)

            last = jnp.full((1,), hand.world.schedule.last)
            grid = interpolate_times(last, t[i : i + 1], 4)
            x_t = sg(rollout(guided, hand.world.schedule, batch.noise[i : i + 1], grid).end)
            now = x_t, t[i : i + 1]
            target = hand.world.denoiser.raw(params, *now, text)
            output = hand.world.denoiser.raw(hand.student, *now, own)
            error = ((output - sg(target)) ** 2).mean()
            for block in blocks:
                pair = [
                    hand.world.denoiser.features(p, *now, c, blocks=(block,))[0]
                    for p, c in ((hand.student, own), (params, text))
                ]
                error = error + 0.3 / len(blocks) * ((pair[0] - sg(pair[1])) ** 2).mean()
            total.append(error)
        return jnp.stack(total)

    return loss


@flow_first
def test_losses_and_gradients_are_those_of_the_formula(world):
    with jax.enable_x64(True):
        frozen, more = networks(), versions()
    compare(one_step(world), DMM(TEACHERS), formula(), networks=frozen, more=more)


@pytest.mark.slow
def test_features_are_compared_with_the_samples_own_teacher():
    with jax.enable_x64(True):
        frozen, more = networks(), versions()
    term = DMM(TEACHERS, features=0.3, blocks=(0, 2))
    world = with_features(one_step(FLOW_WORLD))
    compare(world, term, formula((0, 2)), networks=frozen, more=more)


def test_the_result_is_sampled_as_a_teacher_is():
    needs = DMM(TEACHERS).needs
    assert not needs.is_few_step and not needs.uses_teacher and needs.override == "styles"


@pytest.mark.parametrize(
    "options,message",
    [
        ({"teachers": ("a",)}, "objective.dmm.teachers: found .* two networks or more"),
        ({"teachers": TEACHERS, "steps": 0}, "objective.dmm.steps: found 0; expected 1 or more"),
        ({"teachers": TEACHERS, "features": 0.1}, "objective.dmm.blocks: found .* with features"),
        ({"teachers": TEACHERS, "blocks": (1,)}, "objective.dmm.blocks: found .* with features"),
        ({"teachers": TEACHERS, "features": -1.0}, "objective.dmm.features: found -1.0; expected"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        build({"dmm": options}, TERMS, FLOW_WORLD.times[:-1])


def test_blocks_that_the_teacher_does_not_have_are_refused():
    term = DMM(TEACHERS, features=0.3, blocks=(0, 3))
    with pytest.raises(InputError, match="expected numbers from 0 to below 3"):
        term.check_denoiser(with_features(FLOW_WORLD).denoiser)


def test_a_student_that_is_one_of_the_teachers_has_a_loss_on_the_others_samples_alone():
    world, batch = one_step(FLOW_WORLD), make_batch(SAMPLES)
    batch = batch._replace(override=batch.cond, label=jnp.asarray(LABEL, jnp.int32))
    term, nets = DMM(TEACHERS), networks(jnp.float32)

    @jax.jit
    def run(student):
        roles = Roles(student, networks=nets)

        def loss(student):
            now = make_context(
                world.step_spec(term), term.needs, roles._replace(student=student), batch
            )
            return term(now)[0]

        return loss(student), jax.jacrev(loss)(student)

    loss_B, slopes = run(nets["dmm/1"])
    own = LABEL == 1
    assert np.abs(loss_B[own]).max() < 1e-9 < 1e-3 < loss_B[~own].min()
    assert all(np.abs(leaf[own]).max() < 1e-4 for leaf in jax.tree.leaves(slopes))
    assert all(np.abs(leaf[~own]).max() > 1e-3 for leaf in jax.tree.leaves(slopes))
