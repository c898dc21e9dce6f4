"""Samplers from a diffusers scheduler_config.json.

Supported: DPM-Solver++ of order 1 and 2 (Lu et al. 2022), DDIM (Song et al. 2021), Euler, Euler in
a flow, PNDM, LCM, TCD and SCM, on the timestep grids of diffusers 0.42. A key that asks for another
sampler is refused, never ignored.
"""

from dataclasses import replace
from functools import partial

import numpy as np

from gadjax.diffusion.samplers import Sampler, consistency, plms, tcd
from gadjax.diffusion.schedules import DDPM, Flow, NoiseSchedule, TrigFlow
from gadjax.errors import InputError
from gadjax.formats.flow_grids import flow_grid
from gadjax.formats.scheduler_config import (
    DDIM,
    DPM,
    EULER,
    FLOW_EULER,
    FLOW_LCM,
    LCM,
    PNDM,
    SCM,
    TCD,
    check_disabled,
    parameterization_from_config,
    read_choice,
    read_number,
    read_positive,
    schedule_from_config,
)

_RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def sampler_from_config(
    cfg: dict, pipeline: str | None = None, tokens: int | None = None
) -> Sampler:
    """Sampler that reproduces diffusers' steps under this config.

    Args:
      cfg: scheduler_config.json.
      pipeline: class of the pipeline, by which a flow's grid differs; None: the scheduler by
        itself, given the number of steps alone.
      tokens: of the picture, by which the grid differs under dynamic shifting; None refuses that.

    Raises: InputError, naming the key, for an unsupported scheduler or option.
    """
    flow = {"pipeline": pipeline, "tokens": tokens}
    readers = {DPM: _dpm, DDIM: _ddim, EULER: _euler, FLOW_EULER: partial(_flow_euler, **flow)}
    readers |= {PNDM: _pndm, LCM: _lcm, TCD: _tcd, FLOW_LCM: partial(_flow_lcm, **flow), SCM: _scm}
    name = read_choice(cfg, "_class_name", None, *readers)
    parameterization_from_config(cfg)
    return readers[name](cfg, schedule_from_config(cfg))


def _dpm(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    check_disabled(cfg, *_RESPACINGS, "use_lu_lambdas", "use_dynamic_shifting", "thresholding")
    check_disabled(cfg, "variance_type")
    read_choice(cfg, "algorithm_type", "dpmsolver++", "dpmsolver++")
    read_choice(cfg, "lambda_min_clipped", -float("inf"), -float("inf"))
    # With the end at sigma = 0 the last step is of order 1 in any case, so neither
    # lower_order_final nor euler_at_final changes anything below order 3.
    read_choice(cfg, "final_sigmas_type", "zero", "zero")
    order = read_choice(cfg, "solver_order", 2, 1, 2)
    if order == 2:
        read_choice(cfg, "solver_type", "midpoint", "midpoint")
    if isinstance(schedule, Flow):
        grid = partial(_dpm_flow_grid, schedule.steps, read_positive(cfg, "flow_shift", 1.0))
        return Sampler(schedule, grid, order, takes_timesteps=False)
    spacing = read_choice(cfg, "timestep_spacing", "linspace", "linspace", "leading", "trailing")
    grid = partial(_dpm_grid, schedule.steps, spacing, read_number(cfg, "steps_offset", 0))
    return Sampler(schedule, grid, order)


def _dpm_grid(total: int, spacing: str, offset: int, n: int) -> np.ndarray:
    if spacing == "linspace":
        starts = np.linspace(0, total - 1, n + 1).round()[:0:-1]
    elif spacing == "leading":
        starts = np.arange(1, n + 1)[::-1] * (total // (n + 1)) + offset
    else:
        starts = np.arange(total, 0, -total / n).round() - 1
    return np.append(starts, DDPM.clean)


def _dpm_flow_grid(total: int, shift: float, n: int) -> np.ndarray:
    share = (1 - np.linspace(1, 1 / total, n + 1))[::-1]
    times = shift * share / (1 + (shift - 1) * share) * total
    # The network gets these times floored (see floors_timesteps): for n = 3, 332.99999999999994
    # becomes 332. A time that float32 would round up to an integer is moved below it.
    single = times.astype(np.float32)
    below = np.nextafter(single, np.float32(0)).astype(np.float64)
    return np.where(np.floor(single) > np.floor(times), below, times)


def _ddim(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    check_disabled(cfg, "thresholding")
    read_choice(cfg, "clip_sample", True, False)
    spacing = read_choice(cfg, "timestep_spacing", "leading", "leading", "trailing", "linspace")
    end = schedule.clean if cfg.get("set_alpha_to_one", True) else 0.0
    offset = read_number(cfg, "steps_offset", 0)
    grid = partial(_ddim_grid, schedule.steps, spacing, offset, end)
    return Sampler(schedule, grid, takes_timesteps=False)


def _ddim_grid(total: int, spacing: str, offset: int, end: float, n: int) -> np.ndarray:
    stride = total // n
    if spacing == "leading":
        starts = np.arange(n)[::-1] * stride + offset
    elif spacing == "trailing":
        starts = np.arange(total, 0, -total / n).round() - 1
    else:
        starts = np.linspace(0, total - 1, n).round()[::-1]
    ends = starts - stride
    if np.any(ends[:-1] != starts[1:]):
        raise InputError(
            f"steps: found {n}, with which the steps of {DDIM} do not join under timestep_spacing "
            f"{spacing!r}; expected a divisor of {total} under 'trailing', or 'leading'"
        )
    return np.append(starts, ends[-1] if ends[-1] >= 0 else end)


def _euler(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    # Its latents are x / alpha; only under 'leading' is the first of them z / alpha.
    check_disabled(cfg, *_RESPACINGS)
    read_choice(cfg, "timestep_spacing", "linspace", "leading")
    read_choice(cfg, "timestep_type", "discrete", "discrete")
    read_choice(cfg, "interpolation_type", "linear", "linear")
    read_choice(cfg, "final_sigmas_type", "zero", "zero")
    offset = read_number(cfg, "steps_offset", 0)
    return Sampler(schedule, partial(_euler_grid, schedule.steps, offset))


def _euler_grid(total: int, offset: int, n: int) -> np.ndarray:
    return np.append(np.arange(n)[::-1] * (total // n) + offset, DDPM.clean)


def _flow_euler(cfg: dict, schedule: NoiseSchedule, *, pipeline, tokens) -> Sampler:
    check_disabled(cfg, *_RESPACINGS, "invert_sigmas", "stochastic_sampling")
    return Sampler(schedule, flow_grid(cfg, schedule.steps, pipeline, tokens))


def _pndm(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    read_choice(cfg, "skip_prk_steps", False, True)
    # Its multistep history holds network outputs, which are those of the step only for eps.
    read_choice(cfg, "prediction_type", "epsilon", "epsilon")
    spacing = read_choice(cfg, "timestep_spacing", "leading", "leading")
    end = schedule.clean if cfg.get("set_alpha_to_one", False) else 0.0
    offset = read_number(cfg, "steps_offset", 0)
    grid = partial(_ddim_grid, schedule.steps, spacing, offset, end)
    return Sampler(schedule, grid, takes_timesteps=False, sample_fn=plms, extra_evaluations=1)


def _lcm(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    check_disabled(cfg, "thresholding", "clip_sample")
    original = int(read_number(cfg, "original_inference_steps", 50))
    scaling = read_number(cfg, "timestep_scaling", 10.0)
    grid = partial(_lcm_grid, schedule.steps, original)
    return Sampler(schedule, grid, sample_fn=partial(consistency, scaling=scaling), stochastic=True)


def _lcm_grid(total: int, original: int, n: int) -> np.ndarray:
    if n > original:
        raise InputError(f"steps: found {n}; expected at most {original}, the steps of LCM's grid")
    origin = (np.arange(1, original + 1) * (total // original) - 1)[::-1]
    indices = np.floor(np.linspace(0, original, n, endpoint=False)).astype(int)
    return np.append(origin[indices], DDPM.clean)


def _tcd(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    """TCD with eta 0, diffusers' default in a pipeline's call; `with_eta` sets another."""
    check_disabled(cfg, "thresholding", "clip_sample")
    original = int(read_number(cfg, "original_inference_steps", 50))
    grid = partial(_lcm_grid, schedule.steps, original)
    return Sampler(schedule, grid, sample_fn=tcd, stochastic=True)


def with_eta(sampler: Sampler, eta: float) -> Sampler:
    """Sampler with a share of fresh noise in its steps, 0 for its own.

    Raises: InputError for a share of another sampler than TCD's.
    """
    if not eta:
        return sampler
    if sampler.sample_fn is not tcd:
        raise InputError(f"eta: found {eta:g}; expected 0, as {TCD} alone has a share of noise")
    return replace(sampler, sample_fn=partial(tcd, eta=eta))


def _flow_lcm(cfg: dict, schedule: NoiseSchedule, *, pipeline, tokens) -> Sampler:
    check_disabled(cfg, *_RESPACINGS, "invert_sigmas", "scale_factors")
    check_disabled(cfg, "use_dynamic_shifting", "shift_terminal")
    # Of explicit timesteps it shifts the sigmas alone.
    return Sampler(
        schedule,
        flow_grid(cfg, schedule.steps, pipeline, tokens),
        takes_timesteps=read_positive(cfg, "shift", 1.0) == 1,
        sample_fn=consistency,
        stochastic=True,
    )


def _scm(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    return Sampler(schedule, _scm_grid, sample_fn=consistency, stochastic=True)


def _scm_grid(n: int) -> np.ndarray:
    # SanaSprintPipeline's default: the second of two steps starts at 1.3.
    last = TrigFlow.last
    return np.array([last, 1.3, 0.0]) if n == 2 else np.linspace(last, 0.0, n + 1)
