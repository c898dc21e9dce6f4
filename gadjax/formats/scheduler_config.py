"""What a diffusers scheduler_config.json says of noise and network, and the one of a student.

Values assumed for keys that a config lacks are those of diffusers 0.42.
"""

from collections.abc import Sequence

from gadjax.diffusion.schedules import DDPM, Flow, NoiseSchedule, TrigFlow
from gadjax.errors import InputError, short_repr

DPM = "DPMSolverMultistepScheduler"
DDIM = "DDIMScheduler"
EULER = "EulerDiscreteScheduler"
FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
PNDM = "PNDMScheduler"
LCM = "LCMScheduler"
SCM = "SCMScheduler"
PIXART = "PixArtAlphaPipeline"
MOST_STEPS, LARGEST = 100_000, 1e9

PREDICTION_TYPES = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}


def schedule_from_config(cfg: dict) -> NoiseSchedule:
    """The noise schedule of any scheduler that has betas, or of a flow.

    Raises InputError for betas that are neither linear nor scaled_linear, or are rescaled.
    """
    name, steps = cfg.get("_class_name"), number(cfg, "num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        raise refused(cfg, "num_train_timesteps", steps, f"a whole number from 1 to {MOST_STEPS}")
    if is_flow(cfg):
        return Flow(steps)
    if name == SCM:
        return TrigFlow()
    if name not in (DPM, DDIM, EULER, PNDM, LCM) and "beta_schedule" not in cfg:
        raise refused(cfg, "_class_name", name, "a scheduler with a beta_schedule, or of a flow")
    off(cfg, "trained_betas", "rescale_betas_zero_snr")
    return DDPM(
        beta_start=_beta(cfg, "beta_start", 0.00085 if name == LCM else 1e-4),
        beta_end=_beta(cfg, "beta_end", 0.012 if name == LCM else 0.02),
        beta_schedule=choice(
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
        choice(cfg, "prediction_type", "trigflow", "trigflow")
        return "v"
    allowed = [k for k in PREDICTION_TYPES if (k == "flow_prediction") == is_flow(cfg)]
    return PREDICTION_TYPES[choice(cfg, "prediction_type", "epsilon", *allowed)]


def floors_timesteps(cfg: dict) -> bool:
    """Whether diffusers steps from a time but tells the network its whole part only."""
    return cfg.get("_class_name") == DPM and is_flow(cfg)


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
        raise refused(cfg, "_class_name", name, "one with deterministic steps for the student")
    if cfg.get("_class_name") == FLOW_EULER:
        return {"_class_name": FLOW_EULER, "num_train_timesteps": schedule.steps, "shift": 1.0}
    common = {
        "num_train_timesteps": schedule.steps,
        "prediction_type": next(k for k, v in PREDICTION_TYPES.items() if v == kind),
    }
    solver = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
    if isinstance(schedule, Flow):
        shift = positive(cfg, "flow_shift", 1.0)
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


def is_flow(cfg: dict) -> bool:
    name = cfg.get("_class_name")
    if name in (DDIM, EULER, PNDM, LCM, SCM):  # which have no such key
        return False
    return name == FLOW_EULER or bool(cfg.get("use_flow_sigmas"))


def refused(cfg: dict, key: str, found, expected: str) -> InputError:
    absent = "" if key in cfg else " (assumed, the key is absent)"
    found = f"{short_repr(found)}{absent}"
    return InputError(f"scheduler_config.json, {key}: found {found}; expected {expected}")


def choice(cfg: dict, key: str, default, *allowed):
    found = cfg.get(key, default)
    if found not in allowed:
        raise refused(cfg, key, found, " or ".join(repr(a) for a in allowed))
    return allowed[allowed.index(found)]  # not true for 1


def off(cfg: dict, *keys: str) -> None:
    for key in keys:
        if cfg.get(key):
            raise refused(cfg, key, cfg[key], "false or null")


def number(cfg: dict, key: str, default: float) -> float:
    found = cfg.get(key, default)
    if type(found) not in (int, float) or not abs(found) <= LARGEST:
        raise refused(cfg, key, found, "a number")
    return found


def positive(cfg: dict, key: str, default: float) -> float:
    """Of a factor. Raises InputError for a number by which nothing can be multiplied and back."""
    if not (found := number(cfg, key, default)) > 0:
        raise refused(cfg, key, found, "a positive number")
    return found


def _beta(cfg: dict, key: str, default: float) -> float:
    if not 0 < (found := number(cfg, key, default)) < 1:
        raise refused(cfg, key, found, "a number between 0 and 1")
    return float(found)
