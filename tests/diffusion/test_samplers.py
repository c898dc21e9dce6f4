"""Multistep and stochastic samplers against diffusers', with the same fresh noise."""

import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fixed_network import NOISE, SHAPE, assert_close, network

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.rollout import rollout
from gadjax.diffusion.samplers import fresh_noise, keys_from_noise, sample, step_noise, tcd
from gadjax.diffusion.schedules import DDPM
from gadjax.errors import InputError
from gadjax.formats.scheduler_config import (
    parameterization_from_config,
    schedule_from_config,
    student_scheduler_config,
)
from gadjax.formats.schedulers import sampler_from_config, with_eta
from gadjax.types import Cond, Prediction

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
PNDM = dict(_class_name="PNDMScheduler", skip_prk_steps=True, **SD)
LCM = dict(_class_name="LCMScheduler")
TCD = dict(_class_name="TCDScheduler")
FLOW_LCM = dict(_class_name="FlowMatchLCMScheduler")
SCM = dict(_class_name="SCMScheduler", sigma_data=0.5, prediction_type="trigflow")
CONFIGS = {
    "pndm-sd": dict(PNDM, steps_offset=1, set_alpha_to_one=False, clip_sample=False),
    "pndm-one": dict(PNDM, set_alpha_to_one=True),
    "lcm": LCM,
    "lcm-v": dict(LCM, **SD, prediction_type="v_prediction", timestep_scaling=3.0),
    "flow-lcm": FLOW_LCM,
    "flow-lcm-shifted": dict(FLOW_LCM, shift=3.0),
}


def ours(config, times, eta=0.0):
    sampler = with_eta(sampler_from_config(config), eta)

    def apply(params, x, t, cond):
        return network(jnp, x, t[:, None, None, None])

    denoiser = Denoiser(apply, schedule_from_config(config), parameterization_from_config(config))
    with jax.disable_jit():
        return sample(lambda x, t: denoiser({}, x, t, Cond(None, None)), sampler, NOISE, times)


class Noises:
    """Pass the fresh noise of our samplers to diffusers' schedulers, step by step."""

    def __init__(self, monkeypatch, module):
        self.step = 0
        monkeypatch.setattr(module, "randn_tensor", self)

    def __call__(self, shape, **ignored):
        assert tuple(shape) == SHAPE
        drawn = step_noise(keys_from_noise(jnp.asarray(NOISE)), self.step, jnp.asarray(NOISE))
        self.step += 1
        return torch.tensor(np.array(drawn))


def theirs(config, monkeypatch, scale=1.0, options=(), **arguments):
    kind = getattr(diffusers, config["_class_name"])
    module = sys.modules[kind.__module__]
    noises = Noises(monkeypatch, module) if hasattr(module, "randn_tensor") else None
    scheduler = kind.from_config(config)
    scheduler.set_timesteps(**arguments)
    x = torch.tensor(NOISE) * scale
    for t in scheduler.timesteps[: None if scale == 1 else -1]:
        output = scale * torch.tensor(network(np, np.asarray(x) / scale, np.float32(t)))
        result = scheduler.step(output, t, x, **dict(options))
        x = result.prev_sample
    return np.asarray(x) / scale, scheduler.timesteps.numpy(), noises


@pytest.mark.parametrize(
    "steps", [1, 2, 3, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8, 20))]
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_samples_equal_diffusers(config, steps, monkeypatch):
    end, timesteps_used, noises = theirs(config, monkeypatch, num_inference_steps=steps)
    times = sampler_from_config(config).times(steps)
    starts = list(dict.fromkeys(timesteps_used.tolist()))  # PNDM lists its second time twice
    np.testing.assert_allclose(times[:-1], starts, rtol=0 if starts[0] < 1000 else 1e-6)
    # FlowMatchLCM draws for the last step too, where sigma is 0.
    drawn = steps if config["_class_name"] == FLOW_LCM["_class_name"] else steps - 1
    assert noises is None or noises.step == drawn
    assert_close(ours(config, times), end)


@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [625], [399]])
def test_lcm_takes_times_of_published_students(timesteps, monkeypatch):
    config = dict(LCM, **SD)
    arguments = {"timesteps": timesteps} if len(timesteps) > 1 else {"timesteps": timesteps}
    end, timesteps_used, _ = theirs(config, monkeypatch, **arguments)
    np.testing.assert_array_equal(timesteps_used, timesteps)
    times = sampler_from_config(config).times(timesteps=timesteps)
    assert_close(ours(config, times), end)


TCD_STEPS = [1, 3, 4, [999, 749, 499, 249], [999, 20, 3], [625]]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_equals_diffusers(eta, prediction, monkeypatch):
    """On its own grid and on explicit timesteps."""
    config = dict(TCD, **(SD if prediction == "epsilon" else {}), prediction_type=prediction)
    sampler = sampler_from_config(config)
    for steps in TCD_STEPS:
        named = "timesteps" if isinstance(steps, list) else "num_inference_steps"
        end, starts, noises = theirs(config, monkeypatch, options={"eta": eta}, **{named: steps})
        times = sampler.times(**{"timesteps" if named == "timesteps" else "steps": steps})
        np.testing.assert_array_equal(times[:-1], starts)
        assert noises.step == (len(starts) - 1 if eta else 0)
        assert_close(ours(config, times, eta), end)


@pytest.mark.parametrize("eta", [0.1, 0.3, 0.7, 0.9])
def test_tcds_times_between_are_rounded_as_torch_does(eta):
    """(1 - eta) t' in float32: 0.7 of 10 is 7 there, and below it in float64."""
    times, seen = np.arange(1000)[::-1], []

    class Schedule(DDPM):
        def alpha_sigma(self, t):
            seen.append(np.asarray(t))
            return super().alpha_sigma(t)

    def predict(x, t):
        return Prediction(x, x)

    x = jnp.zeros((1, 1, 1, 1))
    jax.eval_shape(lambda x: tcd(predict, Schedule(), x, times, eta=eta), x)
    between = torch.floor((1 - eta) * torch.tensor(times.copy())).numpy()
    np.testing.assert_array_equal(seen[0], [*between[1:-1], 0])


def test_another_sampler_has_no_share_of_noise():
    assert with_eta(sampler_from_config(LCM), 0.0).stochastic
    with pytest.raises(InputError, match="eta: found 0.3; expected 0, as TCDScheduler alone"):
        with_eta(sampler_from_config(LCM), 0.3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [999, 3], [625]])
def test_a_students_fresh_noise_is_that_of_lcms_scheduler(timesteps, prediction, monkeypatch):
    """Each step is x0 of the network itself and new noise: no boundary condition is left."""
    teacher = dict(PNDM, prediction_type=prediction)
    if prediction == "flow":
        teacher = dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=3.0)
    config = student_scheduler_config(teacher, timesteps, rollout="fresh_noise")
    assert schedule_from_config(config) == schedule_from_config(teacher)
    end, timesteps_used, _ = theirs(config, monkeypatch, timesteps=timesteps)
    np.testing.assert_array_equal(timesteps_used, timesteps)
    times = sampler_from_config(config).times(timesteps=timesteps)
    assert_close(ours(config, times), end)
    denoiser = Denoiser(
        lambda params, x, t, cond: network(jnp, x, t[:, None, None, None]),
        schedule_from_config(config),
        parameterization_from_config(config),
    )
    z = jnp.asarray(NOISE)
    with jax.disable_jit():
        walk = rollout(
            lambda x, t: denoiser({}, x, t, Cond(None, None)),
            denoiser.schedule,
            z,
            times,
            solver=fresh_noise(z),
        )
    assert_close(walk.end, end)


def test_explicit_times_of_a_shifted_flow_are_the_schedulers_own():
    """diffusers shifts their sigmas, and not the times that the network gets."""
    sampler = sampler_from_config(CONFIGS["flow-lcm-shifted"])
    grid = sampler.times(4)
    np.testing.assert_array_equal(sampler.times(timesteps=grid[:-1]), grid)
    with pytest.raises(InputError, match="timesteps: found 999, 500; expected 1000, "):
        sampler.times(timesteps=[999, 500])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_scm_equals_diffusers_in_units_of_sigma_data(steps, monkeypatch):
    more = {} if steps == 2 else {"intermediate_timesteps": None}
    arguments = {"num_inference_steps": steps, **more}
    end, timesteps_used, _ = theirs(SCM, monkeypatch, 0.5, **arguments)
    times = sampler_from_config(SCM).times(steps)
    np.testing.assert_allclose(times, timesteps_used, rtol=1e-6)
    assert_close(ours(SCM, times), end)


def test_stochastic_sampler_is_a_function_of_its_noise():
    times = sampler_from_config(LCM).times(3)
    first = ours(LCM, times)
    np.testing.assert_array_equal(first, ours(LCM, times))
    keys = keys_from_noise(jnp.asarray(NOISE))
    drawn = [step_noise(keys, step, jnp.asarray(NOISE)) for step in (0, 1)]
    assert not np.allclose(drawn[0], drawn[1]) and not np.allclose(drawn[0][0], drawn[0][1])
    # The smallest change of a sample's noise changes its draws and those of no other sample.
    other = NOISE.copy()
    other[0, 0, 0, 0] = np.nextafter(other[0, 0, 0, 0], np.float32(9))
    drawn_other = step_noise(keys_from_noise(jnp.asarray(other)), 0, jnp.asarray(NOISE))
    assert not np.allclose(drawn_other[0], drawn[0][0])
    np.testing.assert_array_equal(drawn_other[1], drawn[0][1])


@pytest.mark.parametrize(
    "config, key",
    [
        (dict(PNDM, skip_prk_steps=False), "skip_prk_steps"),
        (dict(PNDM, prediction_type="v_prediction"), "prediction_type"),
        (dict(PNDM, timestep_spacing="linspace"), "timestep_spacing"),
        (dict(LCM, clip_sample=True), "clip_sample"),
        (dict(TCD, thresholding=True), "thresholding"),
        (dict(SCM, prediction_type="epsilon"), "prediction_type"),
        (dict(FLOW_LCM, use_dynamic_shifting=True), "use_dynamic_shifting"),
        (dict(FLOW_LCM, scale_factors=[1.0, 2.0]), "scale_factors"),
        (dict(FLOW_LCM, shift=0), "shift"),
    ],
)
def test_unsupported_config_is_refused(config, key):
    with pytest.raises(InputError, match=f"scheduler_config.json, {key}: found"):
        sampler_from_config(config)


def test_invalid_times_are_refused():
    with pytest.raises(InputError, match="timesteps: found .* diffusers takes no other"):
        sampler_from_config(CONFIGS["pndm-sd"]).times(timesteps=[899, 449])
    with pytest.raises(InputError, match="steps: found 51; expected at most 50"):
        sampler_from_config(LCM).times(51)
    for config in (SCM, LCM, FLOW_LCM, TCD):
        assert sampler_from_config(config).stochastic
        with pytest.raises(InputError, match="deterministic steps"):
            student_scheduler_config(config, [999])
