"""Timestep grids of FlowMatchEuler and FlowMatchLCM, as each diffusers pipeline class sets them.

The same scheduler_config.json gives two grids: some pipelines pass the number of steps alone, and
the scheduler spaces them between its shifted ends and shifts them again; others pass evenly spaced
sigmas of their own, which are shifted once. Read in the classes' `__call__` in diffusers 0.42.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from gadjax.diffusion.schedules import Flow, shift_time
from gadjax.errors import InputError
from gadjax.formats.pipeline_classes import OWN_SIGMAS, UNSCALED
from gadjax.formats.scheduler_config import read_positive


def flow_grid(cfg: dict, total: int, pipeline: str | None) -> Callable[[int], np.ndarray]:
    """Number of steps n -> times [n + 1] under a scheduler with the key "shift".

    Args:
      cfg: scheduler_config.json.
      total: number of training timesteps, the time of pure noise.
      pipeline: diffusers pipeline class; None: the scheduler is given the number of steps alone.

    Raises: InputError for a class that uses no such scheduler.
    """
    shift = read_positive(cfg, "shift", 1.0)
    if pipeline in OWN_SIGMAS:
        return partial(_shifted_once, total, shift)
    if pipeline is None or pipeline in UNSCALED:
        return partial(_shifted_twice, total, shift)
    raise InputError(
        f"scheduler_config.json, _class_name: found {cfg['_class_name']} of a {pipeline}; expected "
        f"one of {', '.join(UNSCALED)}, or another scheduler"
    )


def _shifted_twice(total: int, shift: float, n: int) -> np.ndarray:
    even = np.linspace(total, shift_time(1.0, shift, total), n)
    return np.append(shift_time(even, shift, total), Flow.clean)


def _shifted_once(total: int, shift: float, n: int) -> np.ndarray:
    return np.append(shift_time(np.linspace(total, total / n, n), shift, total), Flow.clean)
