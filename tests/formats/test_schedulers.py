import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fixed_network import NOISE, SHAPE, assert_close, network

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.rollout import Orders, rollout
from gadjax.diffusion.samplers import sample
from gadjax.diffusion.schedules import DDPM, Flow
from gadjax.errors import InputError
from gadjax.formats.scheduler_config import (
    floors_timesteps,
    parameterization_from_config,
    schedule_from_config,
    student_scheduler_config,
)
from gadjax.formats.schedulers import sampler_from_config
from gadjax.pipelines.pipeline import floor_timesteps
from gadjax.types import Cond

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LINEAR = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
SCALED = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
DPM = dict(_class_name="DPMSolverMultistepScheduler", **LINEAR)
DPM_FLOW = dict(DPM, use_flow_sigmas=True, prediction_type="flow_prediction")
DDIM = dict(_class_name="DDIMScheduler", clip_sample=False, **SCALED)
EULER = dict(_class_name="EulerDiscreteScheduler", timestep_spacing="leading", **SCALED)
FLOW_EULER = dict(_class_name="FlowMatchEulerDiscreteScheduler")
# As PixArt's checkpoints ship it, without the keys that diffusers has added since.
PIXART = json.loads("""{"_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.22.0.dev0", "algorithm_type": "dpmsolver++", "beta_end": 0.02,
    "beta_schedule": "linear", "beta_start": 0.0001, "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": false, "lambda_min_clipped": -Infinity, "lower_order_final": true,
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0,
    "solver_order": 2, "solver_type": "midpoint", "steps_offset": 0, "thresholding": false,
    "timestep_spacing": "linspace", "trained_betas": null, "use_karras_sigmas": false,
    "use_lu_lambdas": false, "variance_type": null}""")
CONFIGS = {
    "pixart": PIXART,
    "dpm1": dict(DPM, solver_order=1, prediction_type="v_prediction"),
    "dpm1-heun": dict(DPM, solver_order=1, solver_type="heun", timestep_spacing="trailing"),
    "dpm2-leading": dict(DPM, timestep_spacing="leading", steps_offset=1, euler_at_final=True),
    "dpm2-trailing": dict(DPM, timestep_spacing="trailing", lower_order_final=False),
    "dpm2-v": dict(DPM, **SCALED, prediction_type="v_prediction"),
    "dpm2-x0": dict(DPM, prediction_type="sample"),
    "dpm2-flow": dict(DPM_FLOW, flow_shift=3.0),
    "dpm1-flow": dict(DPM_FLOW, flow_shift=6.0, solver_order=1),
    "ddim": dict(DDIM, set_alpha_to_one=True),
    "ddim-sd": dict(DDIM, set_alpha_to_one=False, steps_offset=1),
    "ddim-still": dict(DDIM, set_alpha_to_one=False, prediction_type="sample"),
    "ddim-trailing": dict(DDIM, timestep_spacing="trailing", prediction_type="v_prediction"),
    "euler-sdxl": dict(EULER, steps_offset=1),
    "euler-v": dict(EULER, prediction_type="v_prediction"),
    "flow": dict(FLOW_EULER),
    "flow-shifted": dict(FLOW_EULER, shift=3.0),
}


def scheduler(config):
    return getattr(diffusers, config["_class_name"]).from_config(config)


def diffusers_trajectory(config, steps=None, timesteps=None):
    """States alpha x0 + sigma eps before and after each step, and the network's timesteps."""
    theirs = scheduler(config)
    given = {"timesteps": timesteps} if timesteps else {"num_inference_steps": steps}
    theirs.set_timesteps(**given)
    euler = config["_class_name"] == "EulerDiscreteScheduler"
    x = torch.tensor(NOISE) * (theirs.init_noise_sigma if euler else 1)
    states = []
    for t in theirs.timesteps:
        x_t = theirs.scale_model_input(x, t) if hasattr(theirs, "scale_model_input") else x
        states.append(np.asarray(x_t))
        output = torch.tensor(network(np, states[-1], np.float32(t)))
        x = theirs.step(output, t, x).prev_sample
    return [*states, np.asarray(x)], theirs.timesteps.numpy()


def our_predict(config):
    def apply(params, x, t, cond):
        return network(jnp, x, t[:, None, None, None])

    apply = floor_timesteps(apply) if floors_timesteps(config) else apply
    denoiser = Denoiser(apply, schedule_from_config(config), parameterization_from_config(config))
    return lambda x, t: denoiser({}, x, t, Cond(None, None))


def our_network_times(config, times):
    """Timesteps that the network gets for times [n + 1], in float32."""
    started = times[:-1].astype(np.float32)
    return np.floor(started) if floors_timesteps(config) else started


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 20])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_step_equals_diffusers(config, steps):
    sampler = sampler_from_config(config)
    times = sampler.times(steps)
    theirs, network_times = diffusers_trajectory(config, steps)
    assert times.shape == (steps + 1,) and times.dtype == np.float64
    np.testing.assert_allclose(our_network_times(config, times), network_times, rtol=1e-6)
    orders = Orders(sampler.order, sampler.last_order)
    with jax.disable_jit():  # a Python loop is faster here than 85 compilations
        predict = our_predict(config)
        walk = rollout(predict, sampler.schedule, jnp.asarray(NOISE), times, solver=orders)
    for actual, expected in zip([*walk.x, walk.end], theirs, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_grids_of_every_length(config):
    """Times equal diffusers' for 1 to 50 steps and more; one-line errors where it has none."""
    sampler, theirs = sampler_from_config(config), scheduler(config)
    for steps in [*range(1, 51), 99, 250, 333, 500]:
        theirs.set_timesteps(steps)
        try:
            times = sampler.times(steps)
        except InputError:
            assert config.get("timestep_spacing") == "trailing" and 1000 % steps
            continue
        network_times = times[:-1]
        if isinstance(sampler.schedule, Flow):
            np.testing.assert_allclose(network_times / 1000, theirs.sigmas[:-1].numpy(), rtol=1e-6)
        else:
            np.testing.assert_array_equal(network_times, theirs.timesteps.numpy())


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_floored_timesteps_equal_diffusers_in_any_number_of_steps(shift):
    """diffusers floors in float64: the last of three timesteps, 332.99999999999994, becomes 332."""
    config = dict(DPM_FLOW, flow_shift=shift)
    sampler, theirs = sampler_from_config(config), scheduler(config)
    for steps in [*range(1, 130), 196, 333, 351, 407, 999]:
        theirs.set_timesteps(steps)
        times = sampler.times(steps)
        np.testing.assert_array_equal(our_network_times(config, times), theirs.timesteps.numpy())
        np.testing.assert_allclose(times / 1000, theirs.sigmas.numpy(), rtol=2e-7)


def test_final_times():
    assert sampler_from_config(PIXART).times(4)[-1] == -1
    # The shift is taken twice.
    times = sampler_from_config(CONFIGS["flow-shifted"]).times(4)
    np.testing.assert_allclose(times, [1000, 857.69, 602.15, 8.93, 0], atol=0.01)
    assert sampler_from_config(CONFIGS["ddim"]).times(4)[-1] == -1
    np.testing.assert_array_equal(
        sampler_from_config(CONFIGS["ddim-sd"]).times(4), [751, 501, 251, 1, 0]
    )
    np.testing.assert_array_equal(sampler_from_config(CONFIGS["ddim-still"]).times(2), [500, 0, 0])
    # 1000 // 600 = 1: the last of diffusers' steps goes from time 1 to time 0.
    assert sampler_from_config(CONFIGS["ddim-sd"]).times(600)[-1] == 0
    assert sampler_from_config(dict(CONFIGS["ddim"], steps_offset=1)).times(600)[-1] == 0


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("timesteps", [[899, 674, 449, 224], [999], [999, 20, 0]])
def test_custom_timesteps_equal_diffusers(order, timesteps):
    config = dict(DPM, solver_order=order)
    sampler = sampler_from_config(config)
    times = sampler.times(timesteps=timesteps)
    np.testing.assert_array_equal(times, [*timesteps, -1])
    states, network_times = diffusers_trajectory(config, timesteps=timesteps)
    np.testing.assert_array_equal(network_times, timesteps)
    assert_close(sample(our_predict(config), sampler, NOISE, times), states[-1])


STUDENTS = {
    "eps": (PIXART, [899, 674, 449, 224]),
    "v": (CONFIGS["ddim-trailing"], [999, 749, 499, 249]),
    "sdxl": (CONFIGS["euler-sdxl"], [999, 749, 400]),
    "flow": (CONFIGS["flow-shifted"], [1000.0, 900.0, 750.0, 499.5]),
    "flow-dpm": (dict(DPM_FLOW, flow_shift=1.0), [999, 749.25, 499.5, 249.75]),
    "flow-dpm-rounded": (dict(DPM_FLOW, flow_shift=1.0), [999, 666, 333]),
    "flow-dpm-shifted": (CONFIGS["dpm2-flow"], [999.67, 749.62]),
    "one-eps": (PIXART, [999]),
    "one-v": (CONFIGS["dpm2-v"], [899]),
    "one-x0": (CONFIGS["ddim-still"], [625]),
    "one-flow": (CONFIGS["flow"], [1000.0]),
    "one-flow-dpm": (DPM_FLOW, [999]),
}


@pytest.mark.parametrize("pipeline", ["PixArtAlphaPipeline", "StableDiffusionPipeline"])
@pytest.mark.parametrize("teacher,timesteps", STUDENTS.values(), ids=STUDENTS)
def test_diffusers_takes_our_steps_with_a_students_config(teacher, timesteps, pipeline):
    config = student_scheduler_config(teacher, timesteps, pipeline)
    assert schedule_from_config(config) == schedule_from_config(teacher)
    assert parameterization_from_config(config) == parameterization_from_config(teacher)
    sampler = sampler_from_config(config)
    times = sampler.times(timesteps=timesteps)
    assert sampler.order == 1
    np.testing.assert_allclose(times[:-1], timesteps, rtol=0, atol=0.01)
    called = {"timesteps": timesteps} if sampler.takes_timesteps else {"steps": len(timesteps)}
    states, network_times = diffusers_trajectory(config, **called)
    np.testing.assert_array_equal(our_network_times(config, times), network_times)
    predict, schedule = our_predict(config), sampler.schedule
    walk = rollout(predict, schedule, jnp.asarray(NOISE), times)
    for i, (actual, expected) in enumerate(zip([*walk.x[1:], walk.end], states[1:], strict=True)):
        assert_close(actual, expected)
        # The step alone, from where diffusers stood.
        alone = rollout(predict, schedule, jnp.asarray(states[i]), times[i : i + 2])
        assert_close(alone.end, expected)


def test_limits_of_diffusers_behind_the_students_schedulers():
    """If one of these fails, student_scheduler_config can be simplified."""
    with pytest.raises(TypeError):
        scheduler(CONFIGS["dpm2-flow"]).set_timesteps(timesteps=[999, 500])
    with pytest.raises(TypeError):
        scheduler(DDIM).set_timesteps(timesteps=[999])
    # What PixArtAlphaPipeline calls and reads.
    assert not hasattr(diffusers.FlowMatchEulerDiscreteScheduler, "scale_model_input")
    for config, values in ((DPM, 1), (DDIM, 2)):
        theirs = scheduler(config)
        theirs.set_timesteps(1)
        x = torch.zeros(SHAPE)
        assert len(theirs.step(x, theirs.timesteps[0], x, return_dict=False)) == values


def test_a_student_in_a_dpm_flow_keeps_the_grid():
    config = dict(DPM_FLOW, flow_shift=1.0)
    sampler = sampler_from_config(student_scheduler_config(config, [999, 500]))
    with pytest.raises(InputError) as caught:
        sampler.times(timesteps=[999, 500])
    line = str(caught.value)
    assert line.startswith("timesteps: found 999, 500; expected 999, 499.5, the grid of 2")
    times = sampler.times(timesteps=[999, 666, 333])
    np.testing.assert_array_equal(times, sampler.times(3))


def test_schedules_and_parameterizations():
    assert schedule_from_config(PIXART) == DDPM()
    assert schedule_from_config(DDIM) == DDPM(0.00085, 0.012, "scaled_linear")
    assert schedule_from_config(dict(DPM, num_train_timesteps=500)) == DDPM(steps=500)
    assert schedule_from_config({"_class_name": "DDIMScheduler"}) == DDPM()
    assert schedule_from_config(dict(SCALED, _class_name="PNDMScheduler")).beta_end == 0.012
    assert schedule_from_config(CONFIGS["flow"]) == Flow()
    assert schedule_from_config(CONFIGS["dpm2-flow"]) == Flow()
    kinds = {k: parameterization_from_config(v) for k, v in CONFIGS.items()}
    assert kinds["pixart"] == kinds["ddim"] == "eps"
    assert kinds["dpm2-v"] == "v" and kinds["dpm2-x0"] == "x0"
    assert kinds["flow"] == kinds["dpm2-flow"] == "flow"


RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SWITCHES = [
    *((base, key) for base in (DPM, EULER, FLOW_EULER) for key in RESPACINGS),
    *((base, "rescale_betas_zero_snr") for base in (DPM, DDIM, EULER)),
    *((base, "thresholding") for base in (DPM, DDIM)),
    *((base, "use_dynamic_shifting") for base in (DPM_FLOW, FLOW_EULER)),
    *((FLOW_EULER, key) for key in ("invert_sigmas", "stochastic_sampling")),
    (DPM, "use_lu_lambdas"),
]


@pytest.mark.parametrize(
    "base,key,value,expected",
    [
        *((base, key, True, "false or null") for base, key in SWITCHES),
        (FLOW_EULER, "shift_terminal", 0.1, "false or null"),
        (DPM, "trained_betas", [0.1, 0.2], "false or null"),
        (DPM, "variance_type", "learned_range", "false or null"),
        (DPM, "algorithm_type", "sde-dpmsolver++", "'dpmsolver++'"),
        (DPM, "solver_order", 3, "1 or 2"),
        (DPM, "solver_type", "heun", "'midpoint'"),
        (DPM, "final_sigmas_type", "sigma_min", "'zero'"),
        (DPM, "lambda_min_clipped", -5.1, "-inf"),
        (DPM, "timestep_spacing", "even", "'linspace' or 'leading' or 'trailing'"),
        (DPM, "beta_schedule", "squaredcos_cap_v2", "'linear' or 'scaled_linear'"),
        (DPM, "beta_start", "0.1", "a number"),
        (DPM, "prediction_type", "flow_prediction", "'epsilon' or 'v_prediction' or 'sample'"),
        (DPM_FLOW, "prediction_type", "v_prediction", "'flow_prediction'"),
        (DPM_FLOW, "flow_shift", None, "a number"),
        (DDIM, "clip_sample", True, "False"),
        (EULER, "timestep_spacing", "linspace", "'leading'"),
        (EULER, "timestep_type", "continuous", "'discrete'"),
        (EULER, "interpolation_type", "log_linear", "'linear'"),
        (EULER, "final_sigmas_type", "sigma_min", "'zero'"),
        (DPM, "_class_name", "HeunDiscreteScheduler", "'DPMSolverMultistepScheduler' or 'DDIMS"),
    ],
)
def test_unsupported_options_are_refused(base, key, value, expected):
    sampler_from_config(base)
    with pytest.raises(InputError) as caught:
        sampler_from_config({**base, key: value})
    line = str(caught.value)
    assert line.startswith(f"scheduler_config.json, {key}: found {value!r}; expected {expected}")
    assert "\n" not in line


def test_unsupported_defaults_are_refused():
    with pytest.raises(InputError, match=r"clip_sample: found True \(assumed, the key is absent\)"):
        sampler_from_config({"_class_name": "DDIMScheduler"})
    with pytest.raises(InputError, match="_class_name: found None"):
        sampler_from_config({})
    with pytest.raises(InputError, match="_class_name: found 'KarrasVeScheduler'"):
        schedule_from_config({"_class_name": "KarrasVeScheduler", "sigma_min": 0.02})
    with pytest.raises(InputError, match="prediction_type: found 'trigflow'"):
        parameterization_from_config(
            {"_class_name": DPM["_class_name"], "prediction_type": "trigflow"}
        )


@pytest.mark.parametrize(
    "config,given,message",
    [
        ("pixart", dict(), "steps, timesteps: found None and None; expected exactly one"),
        ("pixart", dict(steps=1, timesteps=[999]), "found 1 and .999.; expected exactly one"),
        ("pixart", dict(steps=0), "steps: found 0; expected one or more"),
        ("pixart", dict(steps=1000), "steps: found 1000; expected one or more"),
        ("euler-sdxl", dict(steps=1001), "steps: found 1001; expected"),
        ("ddim", dict(steps=1001), "steps: found 1001; expected"),
        ("pixart", dict(timesteps=[]), "timesteps: found .*falling order, above -1 and up to 999"),
        ("pixart", dict(timesteps=[999, 999]), "timesteps: found .999, 999.; expected"),
        ("pixart", dict(timesteps=[1000, 500]), "up to 999, whole numbers"),
        ("pixart", dict(timesteps=[500.5]), "whole numbers"),
        ("flow", dict(timesteps=[1000, 0]), "above 0 and up to 1000$"),
        ("flow", dict(timesteps=[1000.5]), "above 0 and up to 1000$"),
        ("ddim-trailing", dict(steps=3), "steps: found 3, .*expected a divisor of 1000"),
    ],
)
def test_invalid_steps_and_timesteps_are_refused(config, given, message):
    with pytest.raises(InputError, match=message):
        sampler_from_config(CONFIGS[config]).times(**given)


def test_ddim_under_linspace_does_not_join():
    sampler = sampler_from_config(dict(DDIM, timestep_spacing="linspace"))
    with pytest.raises(InputError, match="do not join under timestep_spacing 'linspace'"):
        sampler.times(4)
