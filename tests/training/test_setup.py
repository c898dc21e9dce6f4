"""What `prepare` refuses, in one line and before anything is compiled."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.models import layers
from gadjax.ops.attention import attention
from gadjax.training import setup
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


def test_an_attention_without_a_forward_derivative(config, monkeypatch):
    """As most fused kernels are: jax.custom_vjp, which jax.jvp cannot pass."""

    @jax.custom_vjp
    def fused(q, k, v, bias=None):
        return attention(q, k, v, bias)

    fused.defvjp(lambda *given: (fused(*given), None), lambda kept, g: (g, g, g, None))
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
        ({"objective": {"denoising": {}}}, "expected a source of pictures for this loss"),
        (
            {"data": {"prompts": "", "world": "gadjax.worlds.shapes"}},
            "found pictures of 32 x 32 in gadjax.worlds.shapes; expected 16 x 16",
        ),
        ({"objective": {"gad": {"steps": 0}}}, "found a map of 0 steps; expected 1 or more"),
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
def test_an_offload_of_what_there_is_not(config, offload, objective, words):
    config.offload, config.objective = offload, objective
    config.data.update(
        prompts="", world="gadjax.worlds.shapes"
    ) if "denoising" in objective else None
    text = refused(config)
    assert all(word in text for word in words)


def test_a_remat_that_is_none(config):
    config.remat = "blocks"
    assert refused(config) == "remat: found 'blocks'; expected one of none, results, block"


@pytest.mark.parametrize("proven", [True, False])
def test_kernels_by_platform(monkeypatch, proven):
    monkeypatch.setattr(setup, "proven", lambda platform, dtype: proven)

    def chosen(choice, platform, here=True):
        device = SimpleNamespace(platform=platform)
        monkeypatch.setattr(jax, "devices", lambda: [device] if here else [])
        return setup.kernels_of(choice, SimpleNamespace(devices=np.array([device])), None)

    assert chosen("auto", "tpu") == chosen("pallas", "tpu") == "tpu"
    assert chosen("auto", "cpu") == chosen("jnp", "gpu") == chosen("jnp", "tpu") == ""
    assert chosen("pallas", "gpu") == chosen("auto", "gpu", here=False) == "gpu"
    assert chosen("auto", "gpu") == ("gpu" if proven else "")
