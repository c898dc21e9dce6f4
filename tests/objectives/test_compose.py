from dataclasses import dataclass

import jax
import numpy as np
import pytest
from closed_form import DDPM_WORLD, gaussian_params, make_batch, mixture_params
from ml_collections import ConfigDict

from gadjax.errors import InputError
from gadjax.objectives import (
    DMD,
    GAD,
    TDM,
    TERMS,
    Adversarial,
    Anchor,
    GADLift,
    GADScript,
    Needs,
    Regression,
    Sum,
    as_config,
    build,
)
from gadjax.objectives.compose import STREAMS, Addable

WORLD, B = DDPM_WORLD, 16
TIMES = WORLD.times[:-1]


def run(total):
    """Loss, metrics and the student's gradient."""
    batch, critic, teacher = make_batch(B), gaussian_params(3), mixture_params()

    def loss(student):
        loss_B, metrics = total(WORLD.context(total, batch, student, critic, teacher))
        return loss_B.mean(), (loss_B, metrics)

    actual = jax.jit(jax.value_and_grad(loss, has_aux=True))(WORLD.student_params(bend=0.2))
    (_, (loss_B, metrics)), slope = jax.device_get(actual)
    return loss_B, metrics, slope


def test_a_term_of_weight_zero_leaves_no_trace():
    """The update is bit for bit the same, and none of its needs is computed."""
    alone = build({"dmd": {"weight": 1.0}}, TERMS, TIMES)
    config = {"dmd": {}, "gad": {"weight": 0.0, "steps": 7}, "anchor": {"weight": 0}}
    combined = build(config, TERMS, TIMES[:1])
    assert combined == alone and combined.needs == alone.needs == DMD().needs
    assert DMD() + 0 * GAD() + 0.0 * (Anchor() + Regression()) == alone
    for a, b in zip(*map(jax.tree.leaves, (run(alone), run(combined))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_sum_weighs_its_terms_and_names_their_metrics():
    total = DMD() + 0.5 * GAD() + 0.05 * Anchor()
    loss_B, metrics, _ = run(total)
    names = {"dmd", "gad", "anchor"}
    actual = {f"loss/{name}" for name in names}
    assert set(metrics) == actual | {"dmd/gap", "gad/cosine", "gad/norm_ratio"}
    weights = {"dmd": 1, "gad": 0.5, "anchor": 0.05}
    expected = sum(w * metrics[f"loss/{name}"] for name, w in weights.items())
    assert loss_B.shape == (B,) and float(loss_B.mean()) == pytest.approx(float(expected), rel=1e-6)


def test_a_terms_random_numbers_do_not_depend_on_its_neighbours():
    """DMD with GAD draws like DMD; also with GADLift, which draws under the same names."""
    (_, alone, _), (_, combined, _) = run(Sum(((1.0, DMD()),))), run(GADLift() + GAD() + DMD())
    assert float(combined["loss/dmd"]) == pytest.approx(float(alone["loss/dmd"]), rel=1e-5)
    assert float(combined["dmd/gap"]) == pytest.approx(float(alone["dmd/gap"]), rel=1e-5)


def test_logs_take_the_names_of_the_config():
    _, metrics, _ = run(build({"gad_lift": {}, "dmd": {}}, TERMS, TIMES))
    assert set(metrics) == {"loss/gad_lift", "gad_lift/gap", "loss/dmd", "dmd/gap"}
    assert set(run(GADLift() + DMD())[1]) == set(metrics)


def test_the_random_streams_of_the_terms_are_as_they_were():
    """Recorded runs can be repeated with them; the terms that came later have their own names."""
    later = {"cd", "decoupled_dmd", "f_distill", "flash_dmd", "phased_dmd"}
    later |= {"seed_difference", "uni_dad", "uni_instruct"}
    streams = {name: STREAMS.get(name, name) for name in TERMS.keys() - later}
    assert streams == {name: TERMS[name].__name__.lower() for name in streams}


@dataclass(frozen=True)
class First(Addable):
    """A term that returns its draw, under a name that its neighbour uses too."""

    needs = Needs()

    def __call__(self, context):
        return context.uniform("t"), {}


class Second(First):
    pass


def test_terms_do_not_share_their_draws():
    batch = make_batch(1000)
    run = jax.jit(lambda total: total(WORLD.context(total, batch))[0], static_argnums=0)
    one, two = (np.asarray(run(Sum(((1.0, term),)))) for term in (First(), Second()))
    both = np.asarray(run(First() + Second()))
    np.testing.assert_allclose(both, one + two, rtol=1e-6)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.15
    assert abs(one.mean() - 0.5) < 0.05 and one.min() >= 0 and one.max() < 1


def test_two_terms_of_one_class_have_separate_draws_and_metrics():
    total = GADLift() + DMD() + 0.5 * GADLift(low=0.5)
    assert total.names == ("gad_lift", "dmd", "gad_lift_2")
    (_, one, _), (_, two, _) = run(GADLift() + DMD()), run(total)
    assert {"loss/gad_lift_2", "gad_lift_2/gap"} == two.keys() - one.keys()
    for name in one:  # the first of a kind is as it is alone
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-5)
    batch, twice = make_batch(1000), First() + First()
    context = WORLD.context(twice, batch)
    a, b = (loss_B for _, _, loss_B, _ in twice.term_losses(context))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.15


def test_a_config_numbers_the_terms_of_a_kind():
    config = {"dmd": {}, "gad": {"weight": 0.5}, "gad_2": {"end": "clean"}, "gad_lift_12": {}}
    total = build(config, TERMS, TIMES)
    assert total.names == tuple(config) and as_config(total, TERMS) == config
    assert total.parts == (DMD() + 0.5 * GAD() + GAD(end="clean") + GADLift()).parts
    # One that is switched off leaves the other its name, and so its draws.
    off = build(config | {"gad": {"weight": 0}}, TERMS, TIMES)
    assert off.names == ("dmd", "gad_2", "gad_lift_12")
    for name in ("gad_1", "gad_02", "gad_x", "gad_", "_2"):
        with pytest.raises(InputError, match=f"objective: found '{name}'; expected one of adv"):
            build({name: {}}, TERMS, TIMES)


def test_sums_of_sums_are_sums():
    dmd, gad, anchor = DMD(), GAD(), Anchor()
    expected = ((2.0, dmd), (1.0, gad), (0.1, anchor))
    assert (2 * dmd + gad + 0.1 * anchor).parts == expected
    assert (2 * dmd + (gad + 0.1 * anchor)).parts == expected
    assert (2 * (dmd + 0.5 * gad) + 0.5 * (0.2 * anchor)).parts == expected
    assert (dmd + (gad + anchor)).parts == ((1.0, dmd), (1.0, gad), (1.0, anchor))
    needs = (dmd + gad + anchor).needs
    assert needs.student and needs.critic and needs.detach_first_step and not needs.endpoint
    # GAD and the anchor walk the same map, once; its tangent is asked for by one of them.
    assert needs.map_tangents == GAD().needs.map_tangents == needs.first_step == needs.all_maps


def test_build_reads_configs():
    config = {"dmd": {"weight": 2.0, "low": 0.1}, "gad": {"weight": 0.5, "end": "clean"}}
    expected = 2 * DMD(low=0.1) + 0.5 * GAD(end="clean")
    assert build(config, TERMS, TIMES) == expected
    assert build(ConfigDict(config), TERMS, TIMES) == expected


@pytest.mark.parametrize(
    "config,message",
    [
        ({"dmdd": {}}, "objective: found 'dmdd'; expected one of adversarial, anchor"),
        (
            {"gad": {"wieght": 1}},
            "objective.gad: found 'wieght'; expected weight, direction, directions, end",
        ),
        ({"gad": 1.0}, "objective.gad: found 1.0; expected options by name"),
        ({"gad": {"weight": "much"}}, "objective.gad.weight: found 'much'; expected a number"),
        ({}, "objective: found no term of non-zero weight"),
        ({"dmd": {"weight": 0}}, "objective: found no term of non-zero weight"),
        ({"dmd": {}, "tdm": {}}, "objective: found 2 terms that train the critic; expected one"),
        ({"gad_lift": {}}, "objective: found 0 terms that train the critic; expected one"),
        ({"gad_script": {}, "gad": {}}, "found 0 terms that train the critic"),
        ({"gad": {"end": "x0"}}, "found end 'x0'; expected 'next', 'clean' or 'whole'"),
        (
            {"dmd": {}, "gad_lift": {"direction": "control"}},
            "direction: found 'control' and no teacher map",
        ),
        ({"sid": {"guidance": "long"}}, "objective.sid.guidance: found 'long'"),
        ({"dmd": {}, "gad": {"step_weights": [1.0]}}, "found 1 of them; expected 0 or 4"),
        ({"dmd": {"backprop": "last"}}, "objective.dmd.backprop: found 'last'"),
        ({"gad": {"weight": float("nan")}}, "objective.gad.weight: found nan; expected a number"),
        ({"dmd": {"low": "x"}}, "objective.dmd.low: found 'x'; expected a number"),
        ({"gad": {"steps": 2.5}}, "objective.gad.steps: found 2.5; expected a whole number"),
        ({"gad": {"normalize": 1}}, "objective.gad.normalize: found 1; expected True or False"),
        ({"gad": {"loss": 1}}, "objective.gad.loss: found 1; expected a name"),
        ({"anchor": {"until": "K"}}, "objective.anchor.until: found 'K'; expected a number"),
        ({"dmd": {"low": -0.1}}, "objective.dmd.low: found -0.1; expected a share from 0 to"),
        ({"dmd": {"low": 1, "high": 1}}, "objective.dmd.low: found 1; expected a share from 0 to"),
        ({"dmd": {"high": 1.1}}, "objective.dmd.high: found 1.1; expected a share from 0.02 to 1"),
        ({"sid": {"low": 0.6, "high": 0.5}}, "objective.sid.high: found 0.5; expected a share"),
        ({"sid": {"low": float("nan")}}, "objective.sid.low: found nan; expected a share"),
        ({"gad_lift": {"low": 0.99}}, "objective.gad_lift.high: found 0.98; expected a share"),
        ({"tdm": {"gap": -1.0}}, "objective.tdm.gap: found -1.0; expected 0 or more"),
        ({"tdm": {"floor": 899.0}}, "objective.tdm.floor: found 899.0; expected less than 899.0"),
        ({"anchor": {"until": 899.0}}, "anchor.until: found 899.0; expected a time between 0 and"),
        ({"denoising": {"balance": -0.5}}, "denoising.balance: found -0.5; expected 0 or more"),
        ({"tdm": {}, "gad_script": {"step": 0.0}}, "gad_script.step: found 0.0; expected more"),
        (
            {"gad": {"direction": "rademacher"}, "gad_lift": {}, "tdm": {}},
            "found directions 1 x 'rademacher' and 1 x 'gaussian'; expected one choice",
        ),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(InputError) as error:
        build(config, TERMS, TIMES)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_one_trainer_may_serve_other_readers():
    total = build({"tdm": {}, "gad_lift": {}, "gad_script": {}}, TERMS, TIMES)
    batch, critic = make_batch(B), gaussian_params(3)

    @jax.jit
    def both(student):
        context = WORLD.context(total, batch, student, critic, None)
        return total.critic_loss(context), TDM().critic_loss(context.with_stream("critic"))

    a, b = both(WORLD.student_params())
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("term", [TDM(), GAD(), Regression(), TDM() + GADScript()], ids=str)
def test_fresh_noise_leaves_no_next_latent(term):
    name = Sum(((1.0, term),)).names[0] if not isinstance(term, Sum) else term.names[0]
    (1.0 * term).check(TIMES, "ode")
    with pytest.raises(
        InputError, match=f"objective.{name}: found a loss of the student's next latent"
    ):
        (1.0 * term).check(TIMES, "fresh_noise")


def test_other_terms_take_a_student_with_fresh_noise():
    total = DMD() + GAD(end="clean") + Anchor() + Regression(end="whole") + Adversarial()
    (total + GAD(end="whole")).check(TIMES, "fresh_noise")
