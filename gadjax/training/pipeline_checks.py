"""Checks of a config beside the teacher's pipeline; each raises InputError before compilation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gadjax.diffusion.geometry import tangent
from gadjax.diffusion.schedules import Flow
from gadjax.errors import InputError
from gadjax.formats.pipeline_classes import UNSCALED
from gadjax.formats.scheduler_config import FLOW_LCM, floors_timesteps
from gadjax.models.depth import check_layers
from gadjax.parallel.placement import SEQUENCE_AXIS
from gadjax.pipelines.pipeline import Pipeline
from gadjax.pipelines.sampling import sampler_and_times
from gadjax.training.batch import encode_raw
from gadjax.training.checks import Settings
from gadjax.training.partial import check_matches
from gadjax.training.workdir import sampling_from_config
from gadjax.types import Params


def check_pipeline(config: ConfigDict, settings: Settings, pipeline: Pipeline) -> tuple[float, ...]:
    """Check what depends on the teacher's pipeline.

    Args:
      config: training config.
      settings: its typed values.
      pipeline: the teacher's pipeline.

    Returns: the student's grid, with the clean end.

    Raises: InputError for a network that does not fit the mesh, a regex of trained parameters that
      matches none, a term that does not fit its schedule, steps that add noise, or times that the
      teacher's sampler does not have.
    """
    check_sequence(pipeline, settings.mesh)
    part = pipeline.folder.components[pipeline.backbone]
    check_layers(tuple(config.student.layers), part.spec, part.abstract)
    check_matches(config, pipeline)
    settings.objective.check_denoiser(pipeline.denoiser)
    times, sampling = settings.times, sampling_from_config(config)
    if pipeline.sampler.stochastic:
        raise InputError(
            f"teacher: found the scheduler {pipeline.folder.scheduler['_class_name']}, whose steps "
            "add noise; expected one with deterministic steps"
        )
    if config.student.guidance != 1 and not pipeline.denoiser.guidance_embedded:
        raise InputError(
            f"student.guidance: found {config.student.guidance}; expected 1.0, as no scale is an "
            "input of this network"
        )
    if sampling.rollout == "fresh_noise":
        check_fresh_noise(pipeline, times)
    if sampling.timesteps is not None:  # None if a teacher is trained by plain denoising
        try:
            *times, _ = sampler_and_times(pipeline, sampling)[1].tolist()
        except InputError as error:
            raise InputError(f"student.{error}") from error
    settings.objective.check_grid(pipeline.denoiser.schedule, times)
    return (*times, pipeline.denoiser.schedule.clean)


def check_sequence(pipeline: Pipeline, mesh: Mesh) -> None:
    """Check sequence sharding. Raises: InputError for a network whose positions cannot be split."""
    family = pipeline.folder.components[pipeline.backbone].family
    if mesh.shape[SEQUENCE_AXIS] > 1 and (why := family.no_sequence_sharding):
        raise InputError(
            f"mesh.sequence: found {mesh.shape[SEQUENCE_AXIS]}; expected 1 for a "
            f"{family.class_names[0]}, {why}"
        )


def check_fresh_noise(pipeline: Pipeline, times: Sequence[float]) -> None:
    """Check that diffusers can draw a student that adds noise after its steps.

    Raises: InputError for a flow whose pipeline cannot use FlowMatchLCMScheduler, or times that the
      teacher's scheduler rounds for the network and the student's does not.
    """
    kind = pipeline.folder.pipeline
    if isinstance(pipeline.denoiser.schedule, Flow) and kind not in UNSCALED:
        raise InputError(
            f"student.rollout: found 'fresh_noise' for a {kind} of a flow; expected 'ode', because "
            f"{FLOW_LCM}, which draws such students, is for {' and '.join(UNSCALED)} alone"
        )
    if floors_timesteps(pipeline.folder.scheduler) and any(t != int(t) for t in times):
        raise InputError(
            f"student.timesteps: found {times}; expected whole numbers, to which the teacher's "
            "scheduler rounds the network's times and the student's does not"
        )


def feature_width(pipeline: Pipeline, frozen: dict[str, Any], params: Params) -> int:
    """Width of the backbone's features, for a discriminator; parameters as for `lower_abstract`.

    Raises: InputError for a family without features.
    """
    if pipeline.denoiser.features is None:
        raise InputError(
            "objective: found a discriminator; expected a family whose networks show features"
        )
    lowered = lower_abstract(pipeline, frozen, params, pipeline.denoiser.features)
    return lowered.out_info.shape[-1]


def lower_abstract(pipeline: Pipeline, frozen: dict[str, Any], params: Params, f: Callable):
    """Lowered computation of `f` for one sample: traced, not compiled; `out_info` has its shapes.

    Args:
      pipeline: the teacher's pipeline, for the latent's shape and the conditioning.
      frozen: parameters that are not trained, and the empty prompt under "null".
      params: all parameters of the network, or their shapes.
      f: (params, x_BHWC, t_B, cond) -> any tree of arrays.
    """

    def run(params, frozen):
        cond = encode_raw(pipeline, frozen, frozen["null"])
        return f(params, jnp.zeros((1, *pipeline.latent)), jnp.zeros(1), cond)

    return jax.jit(run).lower(*jax.eval_shape(lambda *trees: trees, params, frozen))


def check_tangents(pipeline: Pipeline, frozen: dict[str, Any], params: Params) -> None:
    """Check that the denoiser has a forward derivative.

    Args:
      pipeline, frozen, params: as `lower_abstract` takes them.

    Raises: InputError for a network through which jax.jvp cannot go, as with an attention kernel
      that has no forward derivative.
    """

    def latent_tangent(params, x, t, cond):
        return tangent(lambda x: pipeline.denoiser.raw(params, x, t, cond), x, x)

    try:
        lower_abstract(pipeline, frozen, params, latent_tangent)
    except (TypeError, ValueError, NotImplementedError) as error:
        why = str(error).split(".")[0]
        raise InputError(
            f"objective: found a network without a forward derivative ({why}); expected one "
            "through which jax.jvp goes (an attention with a jvp rule)"
        ) from error
