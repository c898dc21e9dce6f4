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
    "world,divergence",
    [pytest.param(FLOW_WORLD, "js", marks=pytest.mark.slow), (DDPM_WORLD, "neyman")],
    ids=["flow", "ddpm"],
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


POWERS = {"rkl": 0.0, "kl": 1.0, "hellinger": 0.5, "neyman": -1.0}


@pytest.mark.parametrize("divergence", POWERS)
def test_with_the_exact_ratio_it_is_the_gradient_of_the_divergence(divergence):
    """Student a z and teacher b z, of variances p and q at time t: s_F - s_T is linear in x, and
    E_F r^power |s_F - s_T|^2 has a closed form in a, whose derivative all terms have a part in."""
    world, term, samples = one_step(FLOW_WORLD), UniInstruct(divergence), 40_000
    start, end, t, power = 0.7, 0.8, 400.0, POWERS[divergence]
    alpha, sigma = (float(v) for v in world.schedule.alpha_sigma(t))
    critic, teacher = (law(scale * np.eye(D, dtype=np.float32)) for scale in (start, end))
    variances = [(alpha * scale) ** 2 + sigma**2 for scale in (start, end)]
    batch = make_batch(samples, text_scale=0.0)

    @jax.jit
    def run(a):
        def loss(a):
            step = {"matrix": a * jnp.eye(D), "bias": jnp.zeros(D), "bend": jnp.zeros(D)}
            context = world.context(term, batch, {"step0": step}, critic, teacher)
            x0, t_B = context.student[0].x0, jnp.full(samples, t)
            x_t = alpha * x0 + sigma * context.normal("eps")
            square = (x_t**2).sum((1, 2, 3))
            log_p, log_q = (-square / (2 * v) - D / 2 * np.log(v) for v in variances)
            value_B, _ = term.expanded(context, x0, x_t, t_B, sg(jnp.exp(log_q - log_p)))
            real = context.teacher(x_t, t_B).x0
            return value_B * jnp.maximum(sg(jnp.abs(x0 - real).mean((1, 2, 3))), 1e-4)

        return jax.jvp(loss, (a,), (1.0,))[1]

    def exact(a):
        p, q = (alpha * a) ** 2 + sigma**2, variances[1]
        narrowing = 1 + power * (p / q - 1)
        mean = (p / q) ** (power / 2) * narrowing**-0.5  # of r^power, in one dimension
        slope = 1 / q - 1 / p  # s_F - s_T = slope x
        scale = sigma**4 / alpha**2  # 1 / k^2, by which the loss is divided
        return scale * slope**2 * p / narrowing * mean**D

    expected = float(jax.grad(exact)(start))
    slopes = np.asarray(run(start), float)
    error = slopes.std() / samples**0.5
    print(divergence, "expected", expected, "actual", slopes.mean(), "error", error)
    assert slopes.mean() == pytest.approx(expected, abs=4 * error) and 8 * error < abs(expected)


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
