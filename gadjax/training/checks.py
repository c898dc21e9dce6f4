"""What of a config can be checked before anything is compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gadjax.diffusion.geometry import tangent
from gadjax.errors import InputError
from gadjax.models.params import merge_params
from gadjax.ops.kernels import KERNEL_MODULES, kernels_validated
from gadjax.parallel.placement import SEQUENCE_AXIS
from gadjax.pipelines.pipeline import Pipeline
from gadjax.runtime.distributed import any_process
from gadjax.training.batch import encode_raw
from gadjax.types import Params

OFFLOAD = "teacher", "optimizer", "ema"
ATTENTION = "auto", "jnp", "pallas"


def lower_abstract(pipeline: Pipeline, frozen: dict[str, Any], params: Params, f: Callable):
    """f(params, x_BHWC, t_B, cond) of one sample traced and lowered, but not compiled."""

    def run(params, frozen):
        params = merge_params(params, frozen.get("untrained"))
        cond = encode_raw(pipeline, frozen, frozen["null"])
        return f(params, jnp.zeros((1, *pipeline.latent)), jnp.zeros(1), cond)

    return jax.jit(run).lower(*jax.eval_shape(lambda *given: given, params, frozen))


def check_tangents(pipeline: Pipeline, frozen: dict[str, Any], params: Params) -> None:
    """Raises: InputError for a network through which jax.jvp cannot go, as with an attention
    kernel that has no forward derivative."""

    def moved(params, x, t, cond):
        return tangent(lambda x: pipeline.denoiser.raw(params, x, t, cond), x, x)

    try:
        lower_abstract(pipeline, frozen, params, moved)
    except (TypeError, ValueError, NotImplementedError) as error:
        why = str(error).split(".")[0]
        raise InputError(
            f"objective: found a network without a forward derivative ({why}); expected one "
            "through which jax.jvp goes (an attention with a jvp rule)"
        ) from error


def compute_dtype(name: str):
    if name not in ("float32", "bfloat16"):
        raise InputError(f"dtype: found {name!r}; expected 'float32' or 'bfloat16'")
    return jnp.dtype(name)


def student_times(config: ConfigDict) -> tuple[float, ...]:
    """The times of the student's steps, latest noise first."""
    times = tuple(float(t) for t in config.student.timesteps)
    if config.student.init not in ("teacher", "random"):
        raise InputError(
            f"student.init: found {config.student.init!r}; expected 'teacher' or 'random'"
        )
    if len(times) != config.student.steps or not times:
        raise InputError(
            f"student.steps: found {config.student.steps}; expected the number of "
            f"student.timesteps ({len(times)})"
        )
    if list(times) != sorted(set(times), reverse=True) or times[-1] < 0:
        raise InputError(f"student.timesteps: found {times}; expected falling times from 0 on")
    return times


def check_schedule(name: str, optim: ConfigDict) -> None:
    """Raises: InputError for a decay that ends before the warm-up does."""
    if optim.decay and optim.decay <= optim.warmup:
        raise InputError(
            f"{name}.decay: found {optim.decay}; expected more steps than the warm-up's "
            f"{optim.warmup}, or 0 for none"
        )


def select_kernels(choice: str, mesh: Mesh, dtype: str) -> str:
    """Whose attention kernels a run takes. Raises: InputError for what its devices do not have.

    "auto" tries those for GPUs first, on every process: on an H200 they are right in bfloat16 and
    wrong in float32.
    """
    if choice not in ATTENTION:
        raise InputError(f"attention: found {choice!r}; expected one of {', '.join(ATTENTION)}")
    platform = mesh.devices.flat[0].platform
    if choice == "pallas" and platform not in KERNEL_MODULES:
        raise InputError(
            f"attention: found 'pallas' on a {platform}; expected one of {', '.join(KERNEL_MODULES)}"
        )
    if choice == "jnp" or platform not in KERNEL_MODULES:
        return ""
    if choice == "auto" and platform == "gpu" and mesh.devices.flat[0] in jax.devices():
        return "" if any_process(not kernels_validated(platform, dtype)) else platform
    return platform


def check_sequence(pipeline: Pipeline, mesh: Mesh) -> None:
    """Raises: InputError for a network that does not take a sample on several devices."""
    module = pipeline.folder.components[pipeline.backbone].module
    if mesh.shape[SEQUENCE_AXIS] > 1 and (why := getattr(module, "WHOLE", "")):
        raise InputError(
            f"mesh.sequence: found {mesh.shape[SEQUENCE_AXIS]}; expected 1 for a "
            f"{module.CLASS_NAMES[0]}, {why}"
        )


def check_offload(names: Sequence[str], uses_teacher: bool) -> None:
    """Raises: InputError for what cannot wait in the host's memory."""
    for name in names:
        if name not in OFFLOAD:
            raise InputError(f"offload: found {name!r}; expected some of {', '.join(OFFLOAD)}")
    if "teacher" in names and not uses_teacher:
        raise InputError("offload: found 'teacher' in a run without one; expected it left out")
