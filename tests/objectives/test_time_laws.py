from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import DDPM_WORLD, FLOW_WORLD, gaussian_params, make_batch
from formula_terms import compare, recorded
from scipy.stats import norm

from gadjax.analytic import Bench, Gaussian
from gadjax.errors import InputError
from gadjax.objectives import DMD, TERMS, SiD, build
from gadjax.objectives.time_laws import draw_timesteps, timesteps_below

MANY = 20_000
TIMES = FLOW_WORLD.times[:-1]
SHIFTED = {"times": "shifted", "shift": 3.0, "low": 0.0, "high": 1.0}
LOGIT_NORMAL = {"times": "logit_normal", "low": 0.0, "high": 1.0}


def draws(term, low=0.0, high=1.0, world=FLOW_WORLD):
    """Times and the uniform numbers from which they are made."""

    @jax.jit
    def run():
        context = world.context(SimpleNamespace(needs=TERMS["dmd"]().needs), BATCH, *NETS)
        return draw_timesteps(context, term, low, high), context.uniform("t")

    return [np.asarray(v, float) for v in run()]


BATCH = make_batch(MANY)
NETS = FLOW_WORLD.student_params(), gaussian_params(3), gaussian_params()


def test_uniform_draws_are_as_they_were():
    """Recorded runs can be repeated with them."""
    t, u = draws(DMD(), 0.02, 0.98)
    share = np.float32(0.02) + np.float32(0.96) * u.astype(np.float32)
    np.testing.assert_array_equal(t, np.floor(share * np.float32(1000)) + 1)


def test_shifted_draws_are_uniform_on_the_shifted_grid():
    t, _ = draws(DMD(**SHIFTED))
    j = np.arange(1, 1001) / 1000
    grid = 1000 * 3 * j / (1 + 2 * j)
    nearest = np.abs(t[:, None] - grid).argmin(1)
    np.testing.assert_allclose(t, grid[nearest], rtol=1e-5)
    counts = np.bincount(nearest // 100, minlength=10)
    assert np.abs(counts - MANY / 10).max() < 4 * np.sqrt(MANY / 10)
    assert np.median(t) == pytest.approx(750, abs=8)  # as in DP-DMD's code
    half, _ = draws(DMD(**SHIFTED), 0.5, 1.0)
    assert half.min() >= 750 and half.max() <= 1000


def test_logit_normal_draws():
    t, _ = draws(SiD(**LOGIT_NORMAL))
    sigma = t / 1000
    inner = sigma[(sigma > 0.0011) & (sigma < 1)]
    score = (np.log(inner / (1 - inner)) - np.log(2)) / 1.6
    quantiles = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(score, quantiles), norm.ppf(quantiles), atol=0.05)
    assert np.median(sigma) == pytest.approx(2 / 3, abs=0.01)
    clamped, _ = draws(SiD(**LOGIT_NORMAL), 0.3, 0.8)
    assert clamped.min() == 300 and clamped.max() == 800
    narrow, _ = draws(SiD(times="logit_normal", logit_mean=-1.0, logit_std=0.1))
    assert np.median(narrow) == pytest.approx(1000 / (1 + np.e), abs=2)


def test_times_below_the_drawn_step():
    end = jnp.asarray([1.0, 2.0, 3.5, 500.0] * 500, jnp.float32)

    @jax.jit
    def run():
        context = FLOW_WORLD.context(DMD(), make_batch(2000), *NETS)
        return timesteps_below(context, end, "below")

    t = np.asarray(run()).reshape(-1, 4)
    assert set(t[:, 0]) == set(t[:, 1]) == {1.0} and set(t[:, 2]) == {1.0, 2.0, 3.0}
    assert t[:, 3].min() >= 1 and t[:, 3].max() <= 499 and len(set(t[:, 3])) > 250


@pytest.mark.parametrize("term", [DMD(**SHIFTED), SiD(**LOGIT_NORMAL)], ids=["dmd", "sid"])
def test_both_networks_are_evaluated_at_the_laws_times(term):
    calls, _ = recorded(FLOW_WORLD, term, 512)
    assert [name for name, *_ in calls].count("critic") == 1 and len(calls) == 2
    for _, t, _ in calls:
        assert np.median(t) == pytest.approx(750 if isinstance(term, DMD) else 667, abs=40)

    def critic_loss(hand):
        """At times of the same law over the full span."""
        if isinstance(term, DMD):
            u = (jnp.floor(hand.context.uniform("t") * 1000) + 1) / 1000
            t = 1000 * 3 * u / (1 + 2 * u)
        else:
            u = jax.scipy.special.ndtri(hand.context.uniform("t"))
            t = jnp.clip(1000 * jax.nn.sigmoid(jnp.log(2) + 1.6 * u), 1, 1000)
        x0, eps = jax.lax.stop_gradient(hand.x0()), hand.context.normal("eps")
        raw = hand.world.denoiser.raw(hand.critic, hand.noised(x0, t), t, hand.batch.cond)
        return ((raw - (eps - x0)) ** 2).mean((1, 2, 3))

    def loss(hand):
        return term(hand.context)[0]

    compare(FLOW_WORLD, term, loss, critic_loss)


@pytest.mark.parametrize(
    "config,message",
    [
        (
            {"dmd": {"times": "logit"}},
            "objective.dmd.times: found 'logit'; expected one of uniform",
        ),
        ({"dmd": {"shift": 2.0}}, "objective.dmd.shift: found 2.0 with times='uniform'; expected"),
        (
            {"sid": {"times": "shifted", "logit_std": 1.0}},
            "objective.sid.logit_std: found 1.0 with times='shifted'; expected times='logit_n",
        ),
        (
            {"dmd": {"times": "shifted", "shift": 0.0}},
            "objective.dmd.shift: found 0.0; expected more than 0",
        ),
        (
            {"sid": {"times": "logit_normal", "logit_std": -1.0}},
            "objective.sid.logit_std: found -1.0; expected more than 0",
        ),
        (
            {"sid": {"times": "logit_normal", "logit_mean": float("nan")}},
            "objective.sid.logit_mean: found nan; expected a number",
        ),
        ({"dmd": {"normalizer": "eps"}}, "objective.dmd.normalizer: found 'eps'; expected one of"),
        ({"sid": {"weighting": "snr"}}, "objective.sid.weighting: found 'snr'; expected one of x0"),
        ({"dmd": {"times": 1}}, "objective.dmd.times: found 1; expected a name"),
    ],
)
def test_bad_options(config, message):
    with pytest.raises(InputError) as error:
        build(config, TERMS, TIMES)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_laws_of_flows_are_refused_on_another_schedule():
    message = "found times='shifted' on the schedule DDPM; expected times='uniform', or a flow"
    total = build({"dmd": {"times": "shifted"}}, TERMS, TIMES)
    total.check_denoiser(FLOW_WORLD.denoiser)
    for f in (
        lambda: total.check_denoiser(DDPM_WORLD.denoiser),
        lambda: draws(DMD(**SHIFTED), world=DDPM_WORLD),
        lambda: Bench(Gaussian.random(2), "ddpm").fit(total, 1),
    ):
        with pytest.raises(InputError, match=message):
            f()
