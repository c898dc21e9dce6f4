"""Noise schedule and parameterization from a diffusers scheduler_config.json; a student's config.

Defaults of absent keys are those of diffusers 0.42.
"""

from collections.abc import Sequence

from gadjax.diffusion.schedules import DDPM, Flow, NoiseSchedule, TrigFlow
from gadjax.errors import InputError, short_repr
from gadjax.io.untrusted import is_count, is_number

DPM = "DPMSolverMultistepScheduler"
DDIM = "DDIMScheduler"
EULER = "EulerDiscreteScheduler"
FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
FLOW_LCM = "FlowMatchLCMScheduler"
PNDM = "PNDMScheduler"
LCM = "LCMScheduler"
TCD = "TCDScheduler"
SCM = "SCMScheduler"
STOCHASTIC = LCM, FLOW_LCM, SCM, TCD  # their steps add noise
PIXART = "PixArtAlphaPipeline"
MAX_TRAIN_TIMESTEPS = 100_000

PREDICTION_TYPES = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}


def schedule_from_config(cfg: dict) -> NoiseSchedule:
    """Noise schedule of a scheduler with betas, of a flow, or of SCM.

    Raises: InputError for betas that are neither linear nor scaled_linear, or are rescaled.
    """
    name, steps = cfg.get("_class_name"), read_number(cfg, "num_train_timesteps", 1000)
    if not is_count(steps, 1, MAX_TRAIN_TIMESTEPS):
        raise config_error(
            cfg, "num_train_timesteps", steps, f"a whole number from 1 to {MAX_TRAIN_TIMESTEPS}"
        )
    if is_flow(cfg):
        return Flow(steps)
    if name == SCM:
        return TrigFlow()
    if name not in (DPM, DDIM, EULER, PNDM, LCM, TCD) and "beta_schedule" not in cfg:
        raise config_error(
            cfg, "_class_name", name, "a scheduler with a beta_schedule, or of a flow"
        )
    check_disabled(cfg, "trained_betas", "rescale_betas_zero_snr")
    latent = name in (LCM, TCD)  # their defaults are Stable Diffusion's
    return DDPM(
        beta_start=_beta(cfg, "beta_start", 0.00085 if latent else 1e-4),
        beta_end=_beta(cfg, "beta_end", 0.012 if latent else 0.02),
        beta_schedule=read_choice(
            cfg,
            "beta_schedule",
            "scaled_linear" if latent else "linear",
            *("linear", "scaled_linear"),
        ),
        steps=steps,
    )


def parameterization_from_config(cfg: dict) -> str:
    """Parameterization of the network's output: "eps", "v", "x0" or "flow".

    Raises: InputError for another prediction_type, for flow_prediction in a schedule with betas,
      and for another one in a flow.
    """
    if cfg.get("_class_name") in (FLOW_EULER, FLOW_LCM):
        return "flow"
    if cfg.get("_class_name") == SCM:
        read_choice(cfg, "prediction_type", "trigflow", "trigflow")
        return "v"
    allowed = [k for k in PREDICTION_TYPES if (k == "flow_prediction") == is_flow(cfg)]
    return PREDICTION_TYPES[read_choice(cfg, "prediction_type", "epsilon", *allowed)]


def floors_timesteps(cfg: dict) -> bool:
    """True where diffusers truncates timesteps to integers for the network, not for its steps."""
    return cfg.get("_class_name") == DPM and is_flow(cfg)


def student_scheduler_config(
    cfg: dict, timesteps: Sequence[float], pipeline: str = "", rollout: str = "ode"
) -> dict:
    """scheduler_config.json of a student whose steps start from `timesteps`.

    If the sampler of the returned config has `takes_timesteps`, diffusers must be called with the
    timesteps, otherwise with their number alone:
    - a student of a DPM-Solver++ teacher in a flow keeps the teacher's grid. With flow sigmas
      DPMSolverMultistepScheduler takes no timesteps, and a pipeline written for it (PixArt's)
      cannot use FlowMatchEulerDiscreteScheduler, which has no scale_model_input;
    - the scheduler of a single step in PixArtAlphaPipeline is DDIM. It returns x0 as well as the
      next latent, and that pipeline uses x0 after a single step;
    - a student that adds fresh noise after each step has LCM's scheduler, or in a flow
      FlowMatchLCM's, which only pipelines without scale_model_input can use.

    Args:
      cfg: scheduler_config.json of the teacher.
      timesteps: times that the steps start from, noisiest first; the last step ends at x0.
      pipeline: diffusers pipeline class.
      rollout: of the student: "ode", or "fresh_noise" added to each predicted x0.

    Returns: the student's scheduler_config.json.
    Raises: InputError for a teacher with stochastic steps, and for a student with fixed noise.
    """
    if rollout == "fixed_noise":
        raise InputError(
            "student.rollout: found 'fixed_noise', the initial noise after each step, which no "
            "scheduler of diffusers adds; expected 'ode' or 'fresh_noise' (gadjax sample draws the "
            "workdir)"
        )
    schedule, kind = schedule_from_config(cfg), parameterization_from_config(cfg)
    if (name := cfg.get("_class_name")) in STOCHASTIC:
        raise config_error(cfg, "_class_name", name, "one with deterministic steps for the student")
    flow_scheduler = FLOW_LCM if rollout == "fresh_noise" else FLOW_EULER
    if name == FLOW_EULER or isinstance(schedule, Flow) and rollout == "fresh_noise":
        return {"_class_name": flow_scheduler, "num_train_timesteps": schedule.steps, "shift": 1.0}
    common = {
        "num_train_timesteps": schedule.steps,
        "prediction_type": next(k for k, v in PREDICTION_TYPES.items() if v == kind),
    }
    solver = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
    if isinstance(schedule, Flow):
        shift = read_positive(cfg, "flow_shift", 1.0)
        flow = {"use_flow_sigmas": True, "flow_shift": shift}
        return {"_class_name": DPM, **common, **flow, **solver}
    common |= {
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
    }
    if rollout == "fresh_noise":
        # With this scaling LCM's boundary condition leaves the network's x0 as it is.
        return {"_class_name": LCM, **common, "timestep_scaling": 1e4}
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
    """True for a flow's schedule."""
    name = cfg.get("_class_name")
    if name in (DDIM, EULER, PNDM, LCM, TCD, SCM):  # they have no use_flow_sigmas
        return False
    return name in (FLOW_EULER, FLOW_LCM) or bool(cfg.get("use_flow_sigmas"))


def config_error(cfg: dict, key: str, value, expected: str) -> InputError:
    """Error for an unsupported value of a key, or an unsupported default of an absent one."""
    absent = "" if key in cfg else " (assumed, the key is absent)"
    value = f"{short_repr(value)}{absent}"
    return InputError(f"scheduler_config.json, {key}: found {value}; expected {expected}")


def read_choice(cfg: dict, key: str, default, *allowed):
    """Value of a key that must be one of `allowed`."""
    value = cfg.get(key, default)
    if value not in allowed:
        raise config_error(cfg, key, value, " or ".join(repr(a) for a in allowed))
    return allowed[allowed.index(value)]  # True rather than an equal 1


def check_disabled(cfg: dict, *keys: str) -> None:
    """Raises: InputError for an option that is set."""
    for key in keys:
        if cfg.get(key):
            raise config_error(cfg, key, cfg[key], "false or null")


def read_number(cfg: dict, key: str, default: float) -> float:
    """Value of a key that must be a number of moderate size."""
    value = cfg.get(key, default)
    if not is_number(value):
        raise config_error(cfg, key, value, "a number")
    return value


def read_positive(cfg: dict, key: str, default: float) -> float:
    """Value of a key that must be a positive number: a factor that is also divided by."""
    if not (value := read_number(cfg, key, default)) > 0:
        raise config_error(cfg, key, value, "a positive number")
    return value


def _beta(cfg: dict, key: str, default: float) -> float:
    if not 0 < (value := read_number(cfg, key, default)) < 1:
        raise config_error(cfg, key, value, "a number between 0 and 1")
    return float(value)
