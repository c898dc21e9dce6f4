"""Formula by hand in scores; the gradient of exact divergences between Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    GUIDANCE,
    D,
    gaussian_params,
    law,
    make_batch,
    one_step,
)
from formula_terms import by_head, compare, head_params, pictures, with_features
from test_sim import critic_loss

from gadjax.errors import InputError
from gadjax.objectives import UniInstruct
from gadjax.objectives.density_ratio import DIVERGENCES

sg = jax.lax.stop_gradient
# r^2 f''(r) by hand, with its first two derivatives.
WEIGHTS = {
    "rkl": (lambda r: 1 + 0 * r, lambda r: 0 * r, lambda r: 0 * r),
    "kl": (lambda r: r, lambda r: 1 + 0 * r, lambda r: 0 * r),
    "js": (lambda r: 1 - 1 / (1 + r), lambda r: (1 + r) ** -2.0, lambda r: -2 * (1 + r) ** -3.0),
    "softened_rkl": (
        lambda r: 1 / (1 + r),
        lambda r: -((1 + r) ** -2.0),
        lambda r: 2 * (1 + r) ** -3.0,
    ),
    "neyman": (lambda r: 1 / r, lambda r: -(r**-2.0), lambda r: 2 * r**-3.0),
    "hellinger": (lambda r: r**0.5, lambda r: 0.5 * r**-0.5, lambda r: -0.25 * r**-1.5),
    "jeffreys": (lambda r: 1 + r, lambda r: 1 + 0 * r, lambda r: 0 * r),
}


def loss_by_hand(divergence, gan):
    def loss(hand):
        x0, t = hand.x0(), hand.uniform_times()
        x_t = hand.noised(x0, t)
        alpha, sigma = hand.alpha_sigma(t)
        real, fake = (
            hand.guided(hand.teacher, x_t, t, GUIDANCE),
            hand.guided(hand.critic, x_t, t, 1),
        )
        u = (real.eps - fake.eps) / sigma  # s_F - s_T
        error = -fake.eps / sigma + (x_t - alpha * x0) / sigma**2  # s_F - grad log q
        logit = by_head(hand, sg(x_t), t)
        r = sg(jnp.clip(jnp.exp(jnp.clip(logit, -10, 10)), 0.1, 20))
        h, dh, ddh = (f(r) for f in WEIGHTS[divergence])
        square, product = (u * u).sum((1, 2, 3)), (u * error).sum((1, 2, 3))
        through = (h - r * dh) * square - 2 * h * product
        push = (r**2 * ddh * square + 2 * r * dh * product)[:, None, None, None] * u
        total = through + (sg(push) * (x_t - sg(x_t))).sum((1, 2, 3))
        scale = (sigma**2 / alpha)[:, 0, 0, 0] ** 2
        total = scale * total / D / sg(jnp.abs(x0 - real.x0).mean((1, 2, 3)))
        return total + gan * jnp.log1p(jnp.exp(-gan_logit(hand, x0)))

    return loss


def gan_logit(hand, x0):
    """Logit of the student's sample at a time and noise of its own."""
    given = hand.with_stream("gan")
    t = given.uniform_times(0, 1)
    return by_head(hand, given.noised(x0, t), t)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weights_are_those_of_the_divergences(divergence):
    """r^2 f'' with f by hand, up to a factor."""
    f = {
        "rkl": lambda r: -np.log(r),
        "kl": lambda r: r * np.log(r),
        "js": lambda r: r * np.log(r) - (r + 1) * np.log((r + 1) / 2),
        "softened_rkl": lambda r: (r + 1) * np.log((r + 1) / (2 * r)),
        "neyman": lambda r: (1 - r) ** 2 / r,
        "hellinger": lambda r: (1 - np.sqrt(r)) ** 2,
        "jeffreys": lambda r: (r - 1) * np.log(r),
    }[divergence]
    r, e = np.array([0.3, 0.7, 1.0, 2.0, 5.0]), 1e-4
    expected = r**2 * (f(r + e) - 2 * f(r) + f(r - e)) / e**2
    actual = np.asarray(DIVERGENCES[divergence](jnp.asarray(r)), float)
    np.testing.assert_allclose(actual / actual[2], expected / expected[2], rtol=1e-4)


@pytest.mark.parametrize(
    "world,divergence", [(FLOW_WORLD, "js"), (DDPM_WORLD, "neyman")], ids=["flow", "ddpm"]
)
def test_losses_and_gradients_are_those_of_the_formula(world, divergence):
    term = UniInstruct(divergence, gan=0.3, hidden=6)
    compare(
        with_features(world),
        term,
        loss_by_hand(divergence, 0.3),
        critic_loss,
        head_params(term, float),
        pictures(float),
    )


@pytest.mark.parametrize("divergence", ["rkl", "kl", "hellinger"])
def test_with_the_exact_ratio_it_is_the_gradient_of_the_divergence(divergence):
    """Gaussians of one covariance v I, a distance d apart: |s_F - s_T|^2 is constant in x, so that
    E_F h(r) |s_F - s_T|^2 = E_F h(r) |d|^2 / (v_t)^2 has a closed form in d."""
    world, term, samples = one_step(FLOW_WORLD), UniInstruct(divergence), 40_000
    matrix = 0.8 * np.eye(D, dtype=np.float32)
    student = {"step0": {"matrix": jnp.asarray(matrix), "bias": jnp.zeros(D), "bend": jnp.zeros(D)}}
    critic = law(matrix)
    shift = np.full(D, 0.15, np.float32)
    teacher = critic | {"mean": critic["mean"] + shift}
    batch, t = make_batch(samples, text_scale=0.0), 400.0
    alpha, sigma = (float(v) for v in world.schedule.alpha_sigma(t))
    v_t = alpha**2 * 0.64 + sigma**2

    @jax.jit
    def run(student):
        def loss(student):
            context = world.context(term, batch, student, critic, teacher)
            x0, t_B = context.student[0].x0, jnp.full(samples, t)
            x_t = alpha * x0 + sigma * context.normal("eps")
            away = [((x_t.reshape(-1, D) - m) ** 2).sum(1) for m in (alpha * shift, 0 * shift)]
            ratio = sg(jnp.exp((away[1] - away[0]) / (2 * v_t)))
            value_B, _ = term.expanded(context, x0, x_t, t_B, ratio)
            real = context.teacher(x_t, t_B).x0
            return (value_B * jnp.maximum(sg(jnp.abs(x0 - real).mean((1, 2, 3))), 1e-4)).mean()

        return jax.grad(loss)(student)["step0"]["bias"]

    # E_F r^p = exp(p (p - 1) s / 2) with s = alpha^2 |d|^2 / v_t.
    power = {"rkl": 0.0, "kl": 1.0, "hellinger": 0.5}[divergence]

    def exact(d):
        s = alpha**2 * (d**2).sum() / v_t
        scale = sigma**4 / alpha**2 / D  # of the loss: 1 / k^2 and the number of elements
        return scale * jnp.exp(power * (power - 1) * s / 2) * alpha**2 * (d**2).sum() / v_t**2

    expected = -np.asarray(jax.grad(exact)(jnp.asarray(shift)), float)
    actual = np.asarray(run(student), float)
    np.testing.assert_allclose(actual, expected, atol=0.1 * np.abs(expected).max())
    assert actual.mean() == pytest.approx(expected.mean(), rel=0.04)


def test_zero_with_no_gradient_where_critic_and_teacher_agree():
    world = with_features(FLOW_WORLD)
    term = UniInstruct("jeffreys", gan=0.0, hidden=6)
    batch, teacher = make_batch(8, text_scale=0.0), gaussian_params()

    @jax.jit
    def run(student):
        def loss(student):
            context = world.context(term, batch, student, teacher, teacher)
            x0, t_B = context.student[0].x0, jnp.full(8, 500.0)
            x_t = 0.5 * x0 + 0.5 * context.normal("eps")
            return term.expanded(context, x0, x_t, t_B, jnp.full(8, 2.0))[0].mean()

        return jax.value_and_grad(loss)(student)

    value, slope = jax.device_get(run(world.student_params()))
    assert abs(value) < 1e-5 and max(np.abs(v).max() for v in jax.tree.leaves(slope)) < 1e-5


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"divergence": "fkl"},
            "objective.uni_instruct.divergence: found 'fkl'; expected one of rkl",
        ),
        ({"features": "student"}, "objective.uni_instruct.features: found 'student'; expected one"),
        ({"gan": -1.0}, "objective.uni_instruct.gan: found -1.0; expected 0 or more"),
        ({"hidden": 0}, "objective.uni_instruct.hidden: found 0; expected 1 or more"),
        ({"low": 1.0}, "objective.uni_instruct.low: found 1.0; expected a share"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        UniInstruct(**options)
