"""From a diffusers scheduler_config.json to a schedule, a parameterization and a walk.

Read here are the schedulers whose steps are those of gadjax.rollout (DPM-Solver++ of order 1 and 2,
Lu et al. 2022; DDIM, Song et al. 2021; Euler, and Euler in a flow) or of gadjax.walks (PNDM, LCM,
SCM). Their grids are those of diffusers 0.42, and so are the values assumed for keys that a config
lacks. A key that asks for another walk is refused, never ignored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from gadjax.errors import InputError
from gadjax.rollout import rollout
from gadjax.schedules import DDPM, Flow, NoiseSchedule, TrigFlow, shift_time
from gadjax.types import Prediction
from gadjax.walks import consistency, plms

DPM = "DPMSolverMultistepScheduler"
DDIM = "DDIMScheduler"
EULER = "EulerDiscreteScheduler"
FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
PNDM = "PNDMScheduler"
LCM = "LCMScheduler"
SCM = "SCMScheduler"
PIXART = "PixArtAlphaPipeline"

PREDICTION_TYPES = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}

_RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclass(frozen=True)
class Sampler:
    """How one scheduler walks from noise to a picture.

    grid: number of steps n -> times [n + 1] as diffusers sets them, in the schedule's units.
    order, last_order: as gadjax.rollout.rollout takes them.
    takes_timesteps: whether diffusers lets others than the grid's be chosen.
    walk: (predict, schedule, z_BHWC, times) -> end where it is none of gadjax.rollout's.
    extra: network evaluations beside one a step. renoises: whether steps add new noise.
    """

    schedule: NoiseSchedule
    grid: Callable[[int], np.ndarray]
    order: int = 1
    last_order: int = 1
    takes_timesteps: bool = True
    walk: Callable[..., jax.Array] | None = None
    extra: int = 0
    renoises: bool = False

    def times(
        self, steps: int | None = None, timesteps: Sequence[float] | None = None
    ) -> np.ndarray:
        """The times [n + 1] of a walk of n steps, float64, the noisiest first.

        timesteps: the n times to start a step from, taken as they are (no shift); the walk then
          ends at `schedule.clean`, as one with diffusers' `timesteps=` does. Where diffusers takes
          none they must be those of the grid, to within 0.01, and the grid's are returned.
        Raises InputError unless exactly one of the two is given, and for times that do not fall,
        that the schedule lacks or that diffusers cannot take.
        """
        if (steps is None) == (timesteps is None):
            raise InputError(
                f"steps, timesteps: found {steps} and {timesteps}; expected exactly one of them"
            )
        if timesteps is not None:
            flag, given = "timesteps", list(timesteps)
            times = np.array([*given, self.schedule.clean], np.float64)
        else:
            flag, given = "steps", steps
            times = self.grid(steps) if steps >= 1 else np.empty(0)
        if not self._walkable(times):
            raise InputError(
                f"{flag}: found {given}; expected one or more "
                + ("times in falling order" if flag == "timesteps" else "steps of their own times")
                + f", above {self.schedule.clean:g} and up to {self.schedule.last:g}"
                + (", whole numbers" if isinstance(self.schedule, DDPM) else "")
            )
        return times if timesteps is None or self.takes_timesteps else self._on_grid(times)

    def _on_grid(self, times: np.ndarray) -> np.ndarray:
        grid = self.grid(len(times) - 1)
        if np.abs(grid - times).max() > 0.01:
            raise InputError(
                f"timesteps: found {_listed(times)}; expected {_listed(grid)}, the grid of "
                f"{len(times) - 1} of the scheduler's steps, because diffusers takes no other"
            )
        return grid

    def _walkable(self, times: np.ndarray) -> bool:
        starts = times[:-1]
        return (
            len(starts) > 0
            and bool(np.all(np.diff(starts) < 0))
            # A DDIM walk may stand still at its end: from time 0 to alpha_bar[0], which is time 0.
            and times[-1] <= starts[-1]
            and self.schedule.clean < starts[-1]
            and starts[0] <= self.schedule.last
            and (not isinstance(self.schedule, DDPM) or bool(np.all(times == np.round(times))))
        )


def sample(
    predict: Callable[[jax.Array, jax.Array], Prediction], sampler: Sampler, z_BHWC, times
) -> jax.Array:
    """Where the walk over `times` from z_BHWC ends.

    predict, times: as gadjax.rollout.rollout takes them.
    """
    if sampler.walk is not None:
        return sampler.walk(predict, sampler.schedule, z_BHWC, times)
    orders = {"order": sampler.order, "last_order": sampler.last_order}
    return rollout(predict, sampler.schedule, z_BHWC, times, **orders).end


def schedule_from_config(cfg: dict) -> NoiseSchedule:
    """The noise schedule of any scheduler that has betas, or of a flow.

    Raises InputError for betas that are neither linear nor scaled_linear, or are rescaled.
    """
    name, steps = cfg.get("_class_name"), int(_number(cfg, "num_train_timesteps", 1000))
    if _is_flow(cfg):
        return Flow(steps)
    if name == SCM:
        return TrigFlow()
    if name not in (DPM, DDIM, EULER, PNDM, LCM) and "beta_schedule" not in cfg:
        raise _refused(cfg, "_class_name", name, "a scheduler with a beta_schedule, or of a flow")
    _off(cfg, "trained_betas", "rescale_betas_zero_snr")
    return DDPM(
        beta_start=float(_number(cfg, "beta_start", 0.00085 if name == LCM else 1e-4)),
        beta_end=float(_number(cfg, "beta_end", 0.012 if name == LCM else 0.02)),
        beta_schedule=_choice(
            cfg,
            "beta_schedule",
            "scaled_linear" if name == LCM else "linear",
            *("linear", "scaled_linear"),
        ),
        steps=steps,
    )


def parameterization_from_config(cfg: dict) -> str:
    """What the network's output means: "eps", "v", "x0" or "flow".

    Raises InputError for another prediction_type, and for a flow's in a schedule that is none or
    the reverse.
    """
    if cfg.get("_class_name") == FLOW_EULER:
        return "flow"
    if cfg.get("_class_name") == SCM:
        _choice(cfg, "prediction_type", "trigflow", "trigflow")
        return "v"
    allowed = [k for k in PREDICTION_TYPES if (k == "flow_prediction") == _is_flow(cfg)]
    return PREDICTION_TYPES[_choice(cfg, "prediction_type", "epsilon", *allowed)]


def sampler_from_config(cfg: dict) -> Sampler:
    """The walk that diffusers takes under this config.

    Raises InputError, naming the key, for a scheduler or an option that takes another.
    """
    readers = {DPM: _dpm, DDIM: _ddim, EULER: _euler, FLOW_EULER: _flow_euler}
    readers |= {PNDM: _pndm, LCM: _lcm, SCM: _scm}
    name = _choice(cfg, "_class_name", None, *readers)
    parameterization_from_config(cfg)
    return readers[name](cfg, schedule_from_config(cfg))


def tells_whole_times(cfg: dict) -> bool:
    """Whether diffusers steps from a time but tells the network its whole part only."""
    return cfg.get("_class_name") == DPM and _is_flow(cfg)


def student_scheduler_config(cfg: dict, timesteps: Sequence[float], pipeline: str = "") -> dict:
    """scheduler_config.json of a deterministic student that steps from `timesteps` on to x0, of
    the teacher whose config is `cfg`, for a pipeline of diffusers' class `pipeline`.

    Where the sampler of what is returned takes_timesteps, diffusers is to be called with them;
    elsewhere with their number alone:
    - a teacher of DPM-Solver++ in a flow hands on its own grid. With flow sigmas
      DPMSolverMultistepScheduler takes no timesteps, and a pipeline that was made for it (PixArt's)
      cannot carry FlowMatchEulerDiscreteScheduler, which has no scale_model_input;
    - a single step of PixArtAlphaPipeline is DDIM's. It returns x0 beside the next latent, and x0
      is what that pipeline takes of a single step.
    """
    schedule, kind = schedule_from_config(cfg), parameterization_from_config(cfg)
    if (name := cfg.get("_class_name")) in (LCM, SCM):
        raise _refused(cfg, "_class_name", name, "one with deterministic steps for the student")
    if cfg.get("_class_name") == FLOW_EULER:
        return {"_class_name": FLOW_EULER, "num_train_timesteps": schedule.steps, "shift": 1.0}
    common = {
        "num_train_timesteps": schedule.steps,
        "prediction_type": next(k for k, v in PREDICTION_TYPES.items() if v == kind),
    }
    solver = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
    if isinstance(schedule, Flow):
        shift = _number(cfg, "flow_shift", 1.0)
        flow = {"use_flow_sigmas": True, "flow_shift": shift}
        return {"_class_name": DPM, **common, **flow, **solver}
    common |= {
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
    }
    if len(timesteps) > 1 or pipeline != PIXART:
        return {"_class_name": DPM, **common, **solver}
    (start,) = timesteps
    return {
        "_class_name": DDIM,
        **common,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
        "steps_offset": int(start) if start == int(start) else start,
    }


def _dpm(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    _off(cfg, *_RESPACINGS, "use_lu_lambdas", "use_dynamic_shifting", "thresholding")
    _off(cfg, "variance_type")
    _choice(cfg, "algorithm_type", "dpmsolver++", "dpmsolver++")
    _choice(cfg, "lambda_min_clipped", -float("inf"), -float("inf"))
    # With the end at sigma = 0 the last step is of order 1 in any case, so that neither
    # lower_order_final nor euler_at_final changes anything below order 3.
    _choice(cfg, "final_sigmas_type", "zero", "zero")
    order = _choice(cfg, "solver_order", 2, 1, 2)
    if order == 2:
        _choice(cfg, "solver_type", "midpoint", "midpoint")
    if isinstance(schedule, Flow):
        grid = partial(_dpm_flow_grid, schedule.steps, _number(cfg, "flow_shift", 1.0))
        return Sampler(schedule, grid, order, takes_timesteps=False)
    spacing = _choice(cfg, "timestep_spacing", "linspace", "linspace", "leading", "trailing")
    grid = partial(_dpm_grid, schedule.steps, spacing, _number(cfg, "steps_offset", 0))
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
    # The network is told their whole part (see tells_whole_times), which for n = 3 is 332 of
    # 332.99999999999994: what float32 would round up to a whole number stays below it.
    single = times.astype(np.float32)
    below = np.nextafter(single, np.float32(0)).astype(np.float64)
    return np.where(np.floor(single) > np.floor(times), below, times)


def _ddim(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    _off(cfg, "thresholding")
    _choice(cfg, "clip_sample", True, False)
    spacing = _choice(cfg, "timestep_spacing", "leading", "leading", "trailing", "linspace")
    end = schedule.clean if cfg.get("set_alpha_to_one", True) else 0.0
    offset = _number(cfg, "steps_offset", 0)
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
    reached = starts - stride
    if np.any(reached[:-1] != starts[1:]):
        raise InputError(
            f"steps: found {n}, with which the steps of {DDIM} do not join under timestep_spacing "
            f"{spacing!r}; expected a divisor of {total} under 'trailing', or 'leading'"
        )
    return np.append(starts, reached[-1] if reached[-1] >= 0 else end)


def _euler(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    # Its latents are x / alpha, and under 'leading' alone the first of them is z / alpha.
    _off(cfg, *_RESPACINGS)
    _choice(cfg, "timestep_spacing", "linspace", "leading")
    _choice(cfg, "timestep_type", "discrete", "discrete")
    _choice(cfg, "interpolation_type", "linear", "linear")
    _choice(cfg, "final_sigmas_type", "zero", "zero")
    offset = _number(cfg, "steps_offset", 0)
    return Sampler(schedule, partial(_euler_grid, schedule.steps, offset))


def _euler_grid(total: int, offset: int, n: int) -> np.ndarray:
    return np.append(np.arange(n)[::-1] * (total // n) + offset, DDPM.clean)


def _flow_euler(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    _off(cfg, *_RESPACINGS, "use_dynamic_shifting", "invert_sigmas", "shift_terminal")
    _off(cfg, "stochastic_sampling")
    grid = partial(_flow_euler_grid, schedule.steps, _number(cfg, "shift", 1.0))
    return Sampler(schedule, grid)


def _flow_euler_grid(total: int, shift: float, n: int) -> np.ndarray:
    # Shifted twice: diffusers spaces n times evenly between ends that are shifted already.
    even = np.linspace(total, shift_time(1.0, shift, total), n)
    return np.append(shift_time(even, shift, total), Flow.clean)


def _pndm(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    _choice(cfg, "skip_prk_steps", False, True)
    # Its history is of what the network says, which is of one kind with the step in eps alone.
    _choice(cfg, "prediction_type", "epsilon", "epsilon")
    spacing = _choice(cfg, "timestep_spacing", "leading", "leading")
    end = schedule.clean if cfg.get("set_alpha_to_one", False) else 0.0
    offset = _number(cfg, "steps_offset", 0)
    grid = partial(_ddim_grid, schedule.steps, spacing, offset, end)
    return Sampler(schedule, grid, takes_timesteps=False, walk=plms, extra=1)


def _lcm(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    _off(cfg, "thresholding", "clip_sample")
    original = int(_number(cfg, "original_inference_steps", 50))
    scaling = _number(cfg, "timestep_scaling", 10.0)
    grid = partial(_lcm_grid, schedule.steps, original)
    return Sampler(schedule, grid, walk=partial(consistency, scaling=scaling), renoises=True)


def _lcm_grid(total: int, original: int, n: int) -> np.ndarray:
    if n > original:
        raise InputError(f"steps: found {n}; expected at most {original}, LCM's own")
    origin = (np.arange(1, original + 1) * (total // original) - 1)[::-1]
    chosen = np.floor(np.linspace(0, original, n, endpoint=False)).astype(int)
    return np.append(origin[chosen], DDPM.clean)


def _scm(cfg: dict, schedule: NoiseSchedule) -> Sampler:
    return Sampler(schedule, _scm_grid, walk=consistency, renoises=True)


def _scm_grid(n: int) -> np.ndarray:
    # SanaSprintPipeline's own: of two steps the second starts at 1.3.
    last = TrigFlow.last
    return np.array([last, 1.3, 0.0]) if n == 2 else np.linspace(last, 0.0, n + 1)


def _listed(times: np.ndarray) -> str:
    return ", ".join(f"{time:.2f}".rstrip("0").rstrip(".") for time in times[:-1])


def _is_flow(cfg: dict) -> bool:
    return cfg.get("_class_name") == FLOW_EULER or bool(cfg.get("use_flow_sigmas"))


def _refused(cfg: dict, key: str, found, expected: str) -> InputError:
    absent = "" if key in cfg else " (assumed, the key is absent)"
    return InputError(f"scheduler_config.json, {key}: found {found!r}{absent}; expected {expected}")


def _choice(cfg: dict, key: str, default, *allowed):
    found = cfg.get(key, default)
    if found not in allowed:
        raise _refused(cfg, key, found, " or ".join(repr(a) for a in allowed))
    return found


def _off(cfg: dict, *keys: str) -> None:
    for key in keys:
        if cfg.get(key):
            raise _refused(cfg, key, cfg[key], "false or null")


def _number(cfg: dict, key: str, default: float) -> float:
    found = cfg.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise _refused(cfg, key, found, "a number")
    return found
