"""Random scheduler_config.json files, with the options of the class's own signature."""

import inspect
from typing import Any

import diffusers
from random_folders import VERSIONS
from sweeping import Choice

BETAS = (
    {},
    {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "linear"},
)
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# Usual values of keys; the class has some of them.
USUAL: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000, 1000, 1000, 500),
    "trained_betas": (None,),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "clip_sample": (False,),
    "clip_sample_range": (1.0, 2.0),
    "set_alpha_to_one": (True, False),
    "steps_offset": (0, 1),
    "thresholding": (False,),
    "dynamic_thresholding_ratio": (0.995,),
    "sample_max_value": (1.0,),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "rescale_betas_zero_snr": (False,),
    "skip_prk_steps": (True,),
    "solver_order": (1, 2),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    "lower_order_final": (True, False),
    "euler_at_final": (False, True),
    **{key: (False,) for key in SIGMAS},
    "use_flow_sigmas": (False, None),
    "flow_shift": (1.0, 3.0, 6),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (-float("inf"),),
    "variance_type": (None,),
    "use_dynamic_shifting": (False,),
    "time_shift_type": ("exponential", "linear"),
    "interpolation_type": ("linear",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "timestep_type": ("discrete",),
    "shift": (1.0, 3.0, 2),
    "base_shift": (0.5,),
    "max_shift": (1.15,),
    "base_image_seq_len": (256,),
    "max_image_seq_len": (4096,),
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
    "stochastic_sampling": (False,),
    "scale_factors": (None,),
    "upscale_mode": ("bicubic", "nearest"),
    "original_inference_steps": (50, 25),
    "timestep_scaling": (10.0, 5),
    "sigma_data": (0.5, 1.0),
}
ODD: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (100, 37),
    "beta_schedule": ("squaredcos_cap_v2",),
    "trained_betas": ([0.01] * 1000,),
    "prediction_type": ("flow_prediction", "trigflow", "velocity"),
    "clip_sample": (True,),
    "steps_offset": (3, 10, 0.5),
    "thresholding": (True,),
    "timestep_spacing": ("linspace", "trailing"),
    "rescale_betas_zero_snr": (True,),
    "skip_prk_steps": (False,),
    "solver_order": (3,),
    "algorithm_type": ("dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"),
    "solver_type": ("heun", "logrho"),
    **{key: (True,) for key in SIGMAS},
    "final_sigmas_type": ("sigma_min",),
    "lambda_min_clipped": (-5.1,),
    "variance_type": ("learned_range", "learned"),
    "use_dynamic_shifting": (True,),
    "interpolation_type": ("log_linear",),
    "sigma_min": (0.03,),
    "sigma_max": (14.6,),
    "timestep_type": ("continuous",),
    "shift": (0.5,),
    "flow_shift": (0.5,),
    "invert_sigmas": (True,),
    "shift_terminal": (0.1,),
    "stochastic_sampling": (True,),
    "scale_factors": ([0.5, 1.0],),
    "original_inference_steps": (7, 1000),
    "timestep_scaling": (0, 0.1),
    "set_alpha_to_one": (1,),
}
SUPPORTED = (
    "DPMSolverMultistepScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LCMScheduler",
    "SCMScheduler",
)
# What an older file has not, and walks differently without.
NEEDED = {
    "DDIMScheduler": {"clip_sample": False},
    "PNDMScheduler": {
        "skip_prk_steps": True,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
    },
    "EulerDiscreteScheduler": {"timestep_spacing": "leading"},
    "SCMScheduler": {"prediction_type": "trigflow"},
}


def keys_of(name: str) -> list[str]:
    return list(inspect.signature(getattr(diffusers, name).__init__).parameters)[1:]


def check_options(name: str) -> None:
    """Raises: AssertionError for an option of the class that no case has."""
    absent = set(keys_of(name)).difference(USUAL, BETAS[1])
    assert not absent, f"{name}: found {sorted(absent)} in its signature; expected a choice of each"


def random_scheduler(name: str, pick: Choice, odd: float = 0.2) -> dict[str, Any]:
    """A scheduler_config.json of a class, as some version of diffusers leaves it."""
    keys = keys_of(name)
    betas = {"beta_start", "beta_end", "beta_schedule"}
    config = {key: pick(*USUAL[key]) for key in pick.some(sorted(set(keys) - betas))}
    if betas <= set(keys):
        config |= pick(*BETAS)
    if not pick.chance(0.05):
        config |= {key: value for key, value in NEEDED.get(name, {}).items() if key in keys}
    if name == "DPMSolverMultistepScheduler" and pick.chance(0.3):
        config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    if name == "DDIMScheduler" and pick.chance(0.8):  # others join for some numbers of steps
        config["timestep_spacing"] = "leading"
    if pick.chance(odd):
        key = pick(*sorted({*ODD} & {*keys}))
        config[key] = pick(*ODD[key])
    if pick.chance(0.1):
        config["_use_default_values"] = pick.some(list(config), 0.2)
    if pick.chance(0.1):
        config["unused_option"] = pick(None, 3)
    config["_class_name"] = pick(*SUPPORTED) if pick.chance(0.05) else name
    if version := pick(*VERSIONS):
        config["_diffusers_version"] = version
    return config
