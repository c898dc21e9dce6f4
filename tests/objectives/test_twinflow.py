from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import DDPM_WORLD, FLOW_WORLD, GUIDANCE, World, make_batch, mixture_params
from formula_terms import SAMPLES, compare, recorded

from gadjax.errors import InputError
from gadjax.objectives import TERMS, TwinFlow, build

sg = jax.lax.stop_gradient


def with_negative_times(world: World) -> World:
    """The world with a student that has an output of its own at negative times."""
    world = World(world.schedule, world.kind, world.times)
    plain = world.denoiser

    def apply(params, x, t_B, cond):
        if "step0" not in params:
            return plain.apply(params, x, t_B, cond)
        at, bend = plain.apply(params, x, jnp.abs(t_B), cond), params["step1"]["bias"]
        size = (t_B / 1000)[:, None, None, None]
        twin = jnp.tanh(x + size) * bend.reshape(x.shape[1:]) + 0.3 * at
        return jnp.where(size < 0, twin, at)

    object.__setattr__(world, "denoiser", replace(plain, apply=apply))
    return world


WORLD = with_negative_times(FLOW_WORLD)


def barron(pred, target):
    """`barron_reweighting_loss` of the authors' code, alpha 1."""
    mse = ((pred - target) ** 2).mean((1, 2, 3))
    weight = (mse / (1e-3**2 + 1e-8) / 1.0 + 1.0) ** -0.5
    return mse * sg(weight) / 1e-3


def student_loss(hand):
    """Both parts of the code's training_step: "adv", and "e2e" with `dist_match`."""

    def u(params, x, t, scale=None):
        halves = [hand.world.denoiser.apply(params, x, t, c) for c in (hand.batch.cond,)]
        if scale is not None:
            null = hand.world.denoiser.apply(params, x, t, hand.batch.null)
            return null + scale * (halves[0] - null)
        return halves[0]

    t = hand.context.t_B.astype(hand.context.x_BHWC.dtype)  # exact, unlike t / 1000
    drawn = u(hand.student, hand.context.x_BHWC, t)
    level = (t / 1000)[:, None, None, None]
    x0 = sg(hand.context.x_BHWC - level * drawn)

    def point(name):
        now = hand.with_stream(name)
        t = now.uniform_times(0, 1)
        z, s = now.context.normal("eps"), (t / 1000)[:, None, None, None]
        return s * z + (1 - s) * x0, t, z

    x_t, t, z = point("own")
    own = barron(u(hand.student, x_t, -t), z - x0)
    x_t, t, _ = point("match")
    step = jnp.clip(u(hand.student, x_t, -t) - u(hand.teacher, x_t, t, GUIDANCE), -1, 1)
    return own + 0.5 * barron(drawn, sg(drawn - step))


def test_losses_and_gradients_are_those_of_the_released_code():
    compare(WORLD, TwinFlow(), student_loss)


def test_the_drawn_step_moves_towards_the_teacher_and_away_from_its_twin():
    """With zero weight on neither: -d loss / d u is along v_T - u(-t), where it is not clipped."""
    batch = make_batch(SAMPLES)
    student, teacher = WORLD.student_params(), mixture_params()

    @jax.jit
    def run():
        term = TwinFlow()
        context = WORLD.context(term, batch, student, None, teacher)

        def loss(eps):
            pred = context.student[0]
            moved = replace(context, student=(pred._replace(eps=eps), None))
            return term(moved)[0].sum()

        slope = jax.grad(loss)(context.student[0].eps)
        other = context.with_stream("match")
        t = jnp.floor(other.uniform("t") * 1000) + 1
        s = (t / 1000)[:, None, None, None]
        x_t = (1 - s) * context.student[0].x0 + s * other.normal("eps")
        real = context.teacher(x_t, t)
        twin = WORLD.denoiser.raw(student, x_t, -t, batch.cond)
        return -slope, jnp.clip(real.eps - real.x0 - twin, -1, 1)

    step, towards = (np.asarray(x).reshape(SAMPLES, -1) for x in run())
    norms = np.linalg.norm(step, axis=1) * np.linalg.norm(towards, axis=1)
    np.testing.assert_allclose((step * towards).sum(1) / norms, 1, rtol=1e-4)


def test_a_teacher_that_is_no_flow_is_refused():
    with pytest.raises(InputError, match="found a teacher that predicts eps; expected a flow"):
        TwinFlow().check_denoiser(DDPM_WORLD.denoiser)


def test_bad_options():
    with pytest.raises(InputError, match="objective.twinflow.match: found -1.0; expected 0 or"):
        build({"twinflow": {"match": -1.0}}, TERMS, FLOW_WORLD.times[:-1])


def test_the_teacher_is_asked_at_uniform_times_whatever_step_is_drawn():
    calls, drawn = recorded(WORLD, TwinFlow())
    (name, t_B, _), *others = calls
    assert name == "teacher" and not others
    assert t_B.min() >= 1 and t_B.max() <= 1000 and (t_B == np.round(t_B)).all()
    for time in np.unique(drawn):
        times = np.sort(t_B[drawn == time]) / 1000
        even = np.linspace(0, 1, len(times))
        assert np.abs(times - even).max() < 1.7 / np.sqrt(len(times))  # Kolmogorov-Smirnov, 0.6 %
