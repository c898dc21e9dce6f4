"""Timestep grids of FlowMatchEuler and FlowMatchLCM, as each diffusers pipeline class sets them.

The same scheduler_config.json gives two grids: some pipelines pass the number of steps alone, and
the scheduler spaces them between its shifted ends and shifts them again; others pass evenly spaced
sigmas of their own, which are shifted once. With dynamic shifting the shift follows from the size
of the picture, by a rule of the class. Read in the classes' `__call__` in diffusers 0.42.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from gadjax.diffusion.schedules import Flow, shift_time
from gadjax.errors import InputError
from gadjax.formats.pipeline_classes import (
    FLUX,
    KLEIN,
    LUMINA,
    PASSES_SIGMAS,
    QWEN,
    UNSCALED,
    Z_IMAGE,
)
from gadjax.formats.scheduler_config import (
    check_disabled,
    config_error,
    read_choice,
    read_number,
    read_positive,
)

MAX_EXPONENT = 20.0  # e^20 leaves no time below the largest
Grid = Callable[[int], np.ndarray]  # number of steps n -> times [n + 1]


def flow_grid(cfg: dict, total: int, pipeline: str | None, tokens: int | None) -> Grid:
    """Grid of a scheduler with the key "shift".

    Args:
      cfg: scheduler_config.json.
      total: number of training timesteps, the time of pure noise.
      pipeline: diffusers pipeline class; None: the scheduler is given the number of steps alone.
      tokens: of the picture, for dynamic shifting; None: refused.

    Raises: InputError for a class that uses no such scheduler, or dynamic shifting in one whose
      rule is not known.
    """
    shift = read_positive(cfg, "shift", 1.0)
    if pipeline is not None and pipeline not in UNSCALED:
        raise InputError(
            f"scheduler_config.json, _class_name: found {cfg['_class_name']} of a {pipeline}; "
            f"expected one of {', '.join(UNSCALED)}, or another scheduler"
        )
    if pipeline == LUMINA and total != Flow().steps:  # it divides times by total, its network not
        raise config_error(cfg, "num_train_timesteps", total, f"{Flow().steps}, of a {LUMINA}")
    if pipeline not in PASSES_SIGMAS or tokens is None:
        check_disabled(cfg, "use_dynamic_shifting", "shift_terminal")
    if pipeline not in PASSES_SIGMAS:
        return partial(_shifted_twice, total, shift)
    shift_of = _dynamic_shift(cfg, pipeline, tokens) if cfg.get("use_dynamic_shifting") else None
    terminal = read_number(cfg, "shift_terminal", 0) if cfg.get("shift_terminal") else 0
    if not 0 <= terminal < 1:
        raise config_error(cfg, "shift_terminal", terminal, "null, or a number between 0 and 1")
    return partial(_shifted_once, total, shift_of or (lambda n: shift), terminal)


def _shifted_twice(total: int, shift: float, n: int) -> np.ndarray:
    even = np.linspace(total, shift_time(1.0, shift, total), n)
    return np.append(_shifted(even, shift, total), Flow.clean)


def _shifted(times: np.ndarray, shift: float, total: int) -> np.ndarray:
    return np.minimum(shift_time(times, shift, total), total)  # the first is rounded up by some


def _shifted_once(
    total: int, shift_of: Callable[[int], float], terminal: float, n: int
) -> np.ndarray:
    times = _shifted(np.linspace(total, total / n, n), shift_of(n), total)
    if terminal:  # stretched, so that the last step starts there
        if n == 1:
            raise InputError("steps: found 1; expected 2 or more under shift_terminal")
        times = total - (total - times) * (1 - terminal) / (1 - times[-1] / total)
    return np.append(times, Flow.clean)


def _dynamic_shift(cfg: dict, pipeline: str, tokens: int) -> Callable[[int], float]:
    """Number of steps -> shift for a picture of so many tokens."""
    if pipeline not in _EXPONENTS:
        check_disabled(cfg, "use_dynamic_shifting")
    kind = read_choice(cfg, "time_shift_type", "exponential", "exponential", "linear")
    exponent = _EXPONENTS[pipeline](cfg, tokens)
    return (lambda n: math.exp(exponent(n))) if kind == "exponential" else exponent


def _line(cfg: dict, tokens: int) -> Callable[[int], float]:
    """Exponent on the line through two numbers of tokens; the same for all numbers of steps."""
    low, high = (
        (read_number(cfg, f"{end}_image_seq_len", count), read_number(cfg, f"{end}_shift", value))
        for end, count, value in (("base", 256, 0.5), ("max", 4096, 1.15))
    )
    if low[0] == high[0]:
        raise config_error(cfg, "max_image_seq_len", high[0], "another than base_image_seq_len")
    exponent = low[1] + (tokens - low[0]) * (high[1] - low[1]) / (high[0] - low[0])
    if abs(exponent) > MAX_EXPONENT:
        expected = f"one with a shift of at most {MAX_EXPONENT:g} for {tokens} tokens"
        raise config_error(cfg, "max_shift", high[1], expected)
    return lambda n: exponent


def _fitted(cfg: dict, tokens: int) -> Callable[[int], float]:
    """Exponent of FLUX.2: lines in the tokens at 10 and 200 steps, and between these a line in n.

    The second alone above 4300 tokens. Its numbers are in the pipeline's source.
    """
    at_200, at_10 = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    slope = 0 if tokens > 4300 else (at_200 - at_10) / 190
    return lambda n: at_200 + (n - 200) * slope


# Lumina2Pipeline takes the number of the latents' channels for that of tokens: it is not here.
_EXPONENTS = {FLUX: _line, KLEIN: _fitted, QWEN: _line, Z_IMAGE: _line}
