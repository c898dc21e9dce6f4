"""Refusals of `prepare`, in one line and before anything is compiled."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.models import layers
from gadjax.ops.attention import attention
from gadjax.training import checks, setup
from gadjax.training.config import default_config


@pytest.fixture
def config(tiny_pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red circle\ngreen square\n")
    config = default_config()
    config.teacher = str(tiny_pipeline)
    config.data.update(prompts=str(prompts), length=8)
    config.objective = {"dmd": {}, "gad": {"weight": 0.3}}
    config.batch = 2
    return config


def refused(config) -> str:
    with pytest.raises(InputError) as error:
        setup.prepare(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_guidance_up_to_one_is_none(config):
    """The config's guidance is that of sampling; zeros in objectives are scales."""
    for asked, scale in ((0, 1), (0.5, 1), (3, 3)):
        config.guidance = asked
        assert setup.prepare(config, abstract=True).step_spec.guidance == scale


def test_an_attention_without_a_forward_derivative(config, monkeypatch):
    """As most fused kernels are: jax.custom_vjp, which jax.jvp cannot pass."""

    @jax.custom_vjp
    def fused(q, k, v, bias=None):
        return attention(q, k, v, bias)

    fused.defvjp(lambda *given: (fused(*given), None), lambda untrained, g: (g, g, g, None))
    monkeypatch.setattr(layers, "attention", fused)
    text = refused(config)
    assert text.startswith("objective: found a network without a forward derivative")
    assert "expected one through which jax.jvp goes" in text
    config.objective = {"consistency": {}}  # which takes one in time
    assert refused(config) == text
    config.objective = {"dmd": {}}  # which takes none
    setup.prepare(config)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"critic": {"updates": 0}}, "critic.updates: found 0; expected 1 or more"),
        (
            {"optim": {"warmup": 20, "decay": 20}},
            "optim.decay: found 20; expected more steps than the warm-up's 20, or 0 for none",
        ),
        (
            {"critic": {"warmup": 30}, "optim": {"decay": 20}},
            "critic.decay: found 20; expected more steps than the warm-up's 30, or 0 for none",
        ),
        ({"objective": {"denoising": {}}}, "expected a source of pictures for this loss"),
        (
            {"data": {"prompts": "", "world": "gadjax.worlds.shapes"}},
            "found pictures of 32 x 32 in gadjax.worlds.shapes; expected 16 x 16",
        ),
        ({"objective": {"gad": {"steps": -1}}}, "found a map of -1 steps; expected 1 or more"),
        (
            {"objective": {"sid": {}, "anchor": {"until": 999}}},
            "objective.anchor.until: found 999; expected a time between 0 and ",
        ),
        (
            {"student": {"steps": 1, "timesteps": (899,)}, "objective": {"anchor": {}, "sid": {}}},
            "student.steps: found 1; expected at least 2",
        ),
        (
            {"student": {"steps": 1, "timesteps": (1200,)}},
            "student.timesteps: found [1200]; expected one or more times in falling order",
        ),
    ],
)
def test_objectives_without_what_they_need(config, changes, message):
    objective = changes.pop("objective", None)
    config.update(changes)
    if objective:
        config.objective = objective
    assert message in refused(config)


@pytest.mark.parametrize(
    "offload,objective,words",
    [
        (("critic",), {"dmd": {}}, ("offload: found 'critic'", "teacher, optimizer, ema")),
        (("teacher",), {"denoising": {}}, ("offload: found 'teacher'", "without one")),
    ],
)
def test_bad_offload(config, offload, objective, words):
    config.offload, config.objective = offload, objective
    config.data.update(
        prompts="", world="gadjax.worlds.shapes"
    ) if "denoising" in objective else None
    text = refused(config)
    assert all(word in text for word in words)


def test_bad_remat(config):
    config.remat = "blocks"
    assert refused(config) == "remat: found 'blocks'; expected one of none, results, block"


@pytest.mark.parametrize("kernels_validated", [True, False])
def test_kernels_by_platform(monkeypatch, kernels_validated):
    monkeypatch.setattr(checks, "kernels_validated", lambda platform, dtype: kernels_validated)

    def chosen(choice, platform, here=True):
        device = SimpleNamespace(platform=platform)
        monkeypatch.setattr(jax, "devices", lambda: [device] if here else [])
        return checks.select_kernels(choice, SimpleNamespace(devices=np.array([device])), None)

    assert chosen("auto", "tpu") == chosen("pallas", "tpu") == "tpu"
    assert chosen("auto", "cpu") == chosen("jnp", "gpu") == chosen("jnp", "tpu") == ""
    assert chosen("pallas", "gpu") == chosen("auto", "gpu", here=False) == "gpu"
    assert chosen("auto", "gpu") == ("gpu" if kernels_validated else "")


def rates(optimizer, updates: int) -> np.ndarray:
    """Learning rates of AdamW's first updates: the sizes of its steps on a constant gradient."""
    params, state = jnp.zeros(1), optimizer.init(jnp.zeros(1))

    def update(state, _):
        step, state = optimizer.update(jnp.array([3e3]), state, params)
        return state, -step[0]

    return np.asarray(jax.lax.scan(update, state, None, updates)[1])


def test_learning_rates_of_all_networks_are_those_of_the_same_step(config):
    """In parts of their peaks, at every step of the run, however often the critic is updated."""
    steps, updates = 24, 3
    config.objective = {"dmd": {}}
    config.optim.update(lr=2e-3, warmup=4, decay=steps)
    config.critic.update(updates=updates, lr=5e-3)
    optimizers = setup.prepare(config).step_spec.optimizers
    student = rates(optimizers["student"], steps + 1) / 2e-3
    critic = rates(optimizers["critic"], updates * (steps + 1)) / 5e-3
    np.testing.assert_allclose(critic[::updates], student, atol=2e-5)
    assert critic[updates * steps // 2] > 0.5, "the critic's rate is at its floor half-way"
    # Between two of the student's updates its rates lie between theirs.
    low, high = np.minimum(student[1:], student[:-1]), np.maximum(student[1:], student[:-1])
    for place in range(1, updates):
        between = critic[place::updates][:-1]
        assert np.all((between >= low - 2e-5) & (between <= high + 2e-5))


def test_critic_settings_override_the_students(config):
    config.objective = {"dmd": {}}
    config.optim.update(lr=2e-3, warmup=4, decay=24, clip=1.0)
    config.critic.update(updates=2, lr=5e-3, warmup=0, decay=0, b1=0.5, clip=7.0)
    settings = checks.critic_optim(config, "critic")
    assert (settings.lr, settings.warmup, settings.decay, settings.b1, settings.clip) == (
        5e-3,
        0,
        0,
        0.5,
        7.0,
    )
    assert (settings.b2, settings.weight_decay) == (config.optim.b2, config.optim.weight_decay)
    constant = rates(setup.prepare(config).step_spec.optimizers["critic"], 60)
    np.testing.assert_allclose(constant, 5e-3, rtol=1e-4)


@pytest.mark.parametrize("microbatch,k,samples", [(0, 4, 6), (2, 3, 2), (0, 0, 0)])
def test_blocks_divide_the_samples_of_a_microbatch(config, microbatch, k, samples):
    config.batch, config.microbatch = 6, microbatch
    config.objective.gad.one_in = k
    expected = f"found {k}; expected a divisor of {samples}," if k else "found 0; expected 1 or"
    assert f"one_in: {expected}" in refused(config)
    config.objective.gad.one_in = 2
    checks.validate(config, jax.devices()[:1])
