"""Setup of a run from its config: networks, optimizers, data, and the step's specification."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gadjax import assets
from gadjax.data.source import Source
from gadjax.errors import InputError
from gadjax.formats.state_dict import tensors_from_params
from gadjax.formats.weights import fingerprint
from gadjax.models.params import cast, split_frozen
from gadjax.objectives import TERMS, build
from gadjax.parallel.placement import batch_shards
from gadjax.parallel.sharding import check_batch, make_mesh
from gadjax.pipelines.pipeline import Pipeline, abstract_pipeline, load_pipeline, random_params
from gadjax.pipelines.sampling import sampler_and_times
from gadjax.seeds import check_seed, make_key
from gadjax.training.checks import (
    check_offload,
    check_schedule,
    check_sequence,
    check_tangents,
    compute_dtype,
    lower_abstract,
    select_kernels,
    student_times,
)
from gadjax.training.data import WITH_PICTURES, input_fingerprints, open_data
from gadjax.training.state import StepSpec, TrainState, create_state, make_optimizer
from gadjax.training.steps import CRITICS
from gadjax.training.workdir import sampling_from_config
from gadjax.types import Params

# Config name -> `remat` of the networks.
REMAT = {"none": False, "results": "results", "block": True}


@dataclass(frozen=True)
class Run:
    """A prepared run: step specification, frozen networks and data of a config.

    Attributes:
      config: the training config.
      pipeline: the teacher's pipeline.
      step_spec: static specification of its steps.
      mesh: the run's devices.
      source: data source.
      frozen: parameters that no update changes, by network; the empty prompt under "null", and
        parameters of the backbone that are never trained under "untrained".
      initial_params: initial parameters of student and critic.
      start: initial parameters -> initial training state.
      fingerprint: of the teacher's backbone.
      inputs: fingerprints by key of the config, as `input_fingerprints` returns them.
    """

    config: ConfigDict
    pipeline: Pipeline
    step_spec: StepSpec
    mesh: Mesh
    source: Source
    frozen: dict[str, Any]
    initial_params: Params
    start: Callable[[Params], TrainState]
    fingerprint: str
    inputs: dict[str, str] = field(default_factory=dict)


def prepare(
    config: ConfigDict, *, abstract: bool = False, devices: Sequence[jax.Device] | None = None
) -> Run:
    """Validate a config, then load its networks and data.

    Args:
      config: training config.
      abstract: read the teacher's configs alone: parameters are shapes, and the run can be traced
        and compiled but not executed.
      devices: devices of the mesh; None: all.

    Raises: InputError for whatever is wrong with the config or its files, before device work.
    """
    check_seed(config.seed)
    if jax.config.jax_disable_jit:
        raise InputError(
            "JAX_DISABLE_JIT: found it set; expected it unset, because only compiled "
            "updates place a run's state on its devices"
        )
    times = student_times(config)
    objective = build(config.objective, TERMS, times)
    mesh = make_mesh(config.mesh, devices)
    microbatches = check_batch(config.batch, config.microbatch or config.batch, mesh)
    if objective.needs.images and not any(config.data[name] for name in WITH_PICTURES):
        names = ", ".join(f"data.{name}" for name in WITH_PICTURES)
        raise InputError(f"{names}: found nothing; expected a source of pictures for this loss")
    if not config.teacher:
        raise InputError("teacher: found nothing; expected a diffusers pipeline folder")
    dtype = compute_dtype(config.dtype)
    if config.remat not in REMAT:
        raise InputError(f"remat: found {config.remat!r}; expected one of {', '.join(REMAT)}")
    remat = REMAT[config.remat]
    select_kernels(config.attention, mesh, config.dtype)
    check_offload(config.offload, objective.needs.uses_teacher)
    read = abstract_pipeline if abstract else load_pipeline
    pipeline, params = read(assets.resolve(config.teacher), dtype=dtype, remat=remat)
    check_sequence(pipeline, mesh)
    sampling = sampling_from_config(config)
    if pipeline.sampler.stochastic:
        raise InputError(
            f"teacher: found the scheduler {pipeline.folder.scheduler['_class_name']}, whose steps "
            "add noise; expected one with deterministic steps"
        )
    if sampling.timesteps is not None:  # None if a teacher is trained by plain denoising
        try:
            *times, _ = sampler_and_times(pipeline, sampling)[1].tolist()
        except InputError as error:
            raise InputError(f"student.{error}") from error
    check_schedule("optim", config.optim)
    optimizers = {"student": make_optimizer(config.optim)}
    for role in CRITICS:
        if getattr(objective.needs, role):
            check_schedule("critic", critic_optim(config))
            optimizers[role] = make_optimizer(critic_optim(config), config.critic.updates)
    if len(optimizers) > 1 and config.critic.updates < 1:
        raise InputError(
            f"critic.updates: found {config.critic.updates}; expected 1 or more, because the "
            f"objective needs a {' and a '.join(list(optimizers)[1:])}"
        )
    step_spec = StepSpec(
        denoiser=pipeline.denoiser,
        objective=objective,
        times=(*times, pipeline.denoiser.schedule.clean),
        guidance=pipeline.denoiser.guidance_scale(float(config.guidance)),
        optimizers=optimizers,
        ema=config.ema,
        microbatches=microbatches,
        batch_shards=batch_shards(mesh),
    )
    data = config.data
    source, null = open_data(config, pipeline)
    frozen = {"null": null} | {
        name: cast(params[name], dtype)
        for name, needed in (
            (pipeline.backbone, objective.needs.uses_teacher),
            *(
                (name, not (data.embeddings or data.latents))
                for name in pipeline.folder.text_encoders
            ),
            ("vae", objective.needs.images and not data.latents or config.preview.every),
        )
        if needed
    }

    part = pipeline.folder.components[pipeline.backbone]
    initial_params, untrained = split_frozen(params[pipeline.backbone], part.frozen)
    if config.student.init == "random":
        network = pipeline.networks[pipeline.backbone]
        fresh = network.abstract if abstract else random_params(network, config.seed)
        initial_params, _ = split_frozen(fresh, part.frozen)
    if untrained:
        frozen["untrained"] = untrained

    if objective.needs.tangent or objective.needs.jvp:
        check_tangents(pipeline, frozen, initial_params)
    if objective.needs.discriminator:
        if pipeline.denoiser.features is None:
            raise InputError(
                "objective: found a discriminator; expected a family whose networks show features"
            )
        features = lower_abstract(
            pipeline, frozen, initial_params, pipeline.denoiser.features
        ).out_info
    key = make_key(config.seed)

    def start(initial_params: Params) -> TrainState:
        initial_params = cast(initial_params, jnp.float32)
        roles = {
            role: jax.tree.map(jnp.copy, initial_params)
            for role in optimizers
            if role != "discriminator"
        }
        if objective.needs.discriminator:
            roles["discriminator"] = objective.init_discriminator(key, features.shape[-1])
        return create_state(roles, optimizers)

    identity = "" if abstract else fingerprint(tensors_from_params(part.params, part.keymap))
    inputs = {} if abstract else input_fingerprints(config, source)
    return Run(
        config, pipeline, step_spec, mesh, source, frozen, initial_params, start, identity, inputs
    )


def critic_optim(config: ConfigDict) -> ConfigDict:
    """Optimizer settings of the critic; those that are None are the student's."""
    settings = {key: value for key, value in config.critic.items() if value is not None}
    return ConfigDict(
        dict(config.optim) | {key: settings[key] for key in config.optim if key in settings}
    )
