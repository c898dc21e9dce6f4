"""From a diffusers scheduler_config.json to a schedule, a parameterization and a walk.

Schedulers that take the deterministic steps of gadjax.rollout are read here: DPM-Solver++ of order
1 and 2 (Lu et al. 2022), DDIM (Song et al. 2021), Euler, and Euler in a flow. Their grids are those
of diffusers 0.42. Whatever a config asks for beyond that is refused, never ignored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from gadjax.errors import InputError
from gadjax.rollout import rollout
from gadjax.schedules import DDPM, Flow, NoiseSchedule, shift_time

DPM, DDIM, EULER = "DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler"
FLOW_EULER = "FlowMatchEulerDiscreteScheduler"

PREDICTION_TYPES = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}

# Keys that change the walk, with the values under which it is the one taken here. The first is
# what diffusers assumes where a config, perhaps an old one, lacks the key.
_SHARED = {
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
}
_NEEDED = {
    DPM: {
        **_SHARED,
        "algorithm_type": ("dpmsolver++",),
        "use_lu_lambdas": (False, None),
        "thresholding": (False,),
        "final_sigmas_type": ("zero",),
        "lambda_min_clipped": (-float("inf"), None),
        "variance_type": (None,),
        "use_dynamic_shifting": (False, None),
        "timestep_spacing": ("linspace", "leading", "trailing"),
    },
    DDIM: {
        "clip_sample": (True,),
        "thresholding": (False,),
        "timestep_spacing": ("leading", "trailing", "linspace"),
    },
    EULER: {
        **_SHARED,
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "final_sigmas_type": ("zero",),
    },
    FLOW_EULER: {
        **_SHARED,
        "use_dynamic_shifting": (False,),
        "invert_sigmas": (False,),
        "shift_terminal": (None,),
        "stochastic_sampling": (False,),
    },
}
