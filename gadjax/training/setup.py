"""Setup of a run from its config: networks, optimizers, data, and the step's specification."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gadjax import assets
from gadjax.data.source import Source
from gadjax.formats.state_dict import tensors_from_params
from gadjax.formats.weights import fingerprint
from gadjax.models.adapters import abstract_adapters, init_adapters
from gadjax.models.params import cast, merge_params, split_frozen
from gadjax.objectives.base import Term
from gadjax.parallel.placement import batch_shards
from gadjax.pipelines.pipeline import Pipeline, abstract_pipeline, load_pipeline, random_params
from gadjax.seeds import make_key
from gadjax.training.checks import (
    Settings,
    check_pipeline,
    check_tangents,
    critic_optim,
    feature_width,
    validate,
)
from gadjax.training.data import input_fingerprints, open_data
from gadjax.training.lora import loras
from gadjax.training.state import StepSpec, TrainState, create_state, make_optimizer
from gadjax.training.steps import CRITICS
from gadjax.types import Params


@dataclass(frozen=True)
class LoopSpec:
    """Specification of the training loop around the steps.

    Attributes:
      steps: student updates of the run.
      checkpoint_every: steps between checkpoints.
      keep: number of newest checkpoints that are kept.
      failures: saves in a row that may fail.
      stop_after_bad: non-finite updates in a row that stop the run.
      preview_every: steps between previews; 0 for none.
      preview_prompts: prompts of a preview.
      preview_scale: enlargement of a preview's images.
    """

    steps: int
    checkpoint_every: int
    keep: int
    failures: int
    stop_after_bad: int
    preview_every: int
    preview_prompts: int
    preview_scale: int

    @classmethod
    def from_config(cls, config: ConfigDict) -> "LoopSpec":
        checkpoint, preview = config.checkpoint, config.preview
        return cls(
            steps=config.steps,
            checkpoint_every=checkpoint.every,
            keep=checkpoint.keep,
            failures=checkpoint.failures,
            stop_after_bad=config.stop_after_bad,
            preview_every=preview.every,
            preview_prompts=preview.prompts,
            preview_scale=preview.scale,
        )


@dataclass(frozen=True)
class Run:
    """A prepared run: step specification, frozen networks and data of a config.

    Attributes:
      config: the training config, for records of it; its values are in the other attributes.
      teacher: the config's name of the teacher, for messages.
      seed: of data, noise and initial parameters.
      batch: samples of an update, on all devices together.
      critic_updates: of critic and discriminator, per student update.
      offload: what is in host memory between uses: some of teacher, optimizer, ema.
      kernels: platform of the attention kernels, as `select_kernels` returns it.
      pipeline: the teacher's pipeline.
      step_spec: static specification of its steps.
      loop_spec: specification of the loop around them.
      mesh: the run's devices.
      source: data source.
      frozen: parameters that no update changes, by network; the empty prompt under "null", and
        parameters of the backbone that are never trained under "untrained".
      initial_params: initial parameters of the networks that are trained whole; without one empty.
      start: initial parameters -> initial training state.
      fingerprint: of the teacher's backbone.
      inputs: fingerprints by key of the config, as `input_fingerprints` returns them.
      base: name in `frozen` of what a network's trained parameters are merged into at every call:
        those that are never trained, or the whole teacher where adapters are trained.
    """

    config: ConfigDict
    teacher: str
    seed: int
    batch: int
    critic_updates: int
    offload: tuple[str, ...]
    kernels: str
    pipeline: Pipeline
    step_spec: StepSpec
    loop_spec: LoopSpec
    mesh: Mesh
    source: Source
    frozen: dict[str, Any]
    initial_params: Params
    start: Callable[[Params], TrainState]
    fingerprint: str
    inputs: dict[str, str] = field(default_factory=dict)
    base: str = "untrained"


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
    settings = validate(config, devices)
    objective = settings.objective
    read = abstract_pipeline if abstract else load_pipeline
    teacher = assets.resolve(config.teacher)
    pipeline, params = read(teacher, dtype=settings.dtype, remat=settings.remat)
    step_spec = StepSpec(
        denoiser=pipeline.denoiser,
        objective=objective,
        times=check_pipeline(config, settings, pipeline),
        guidance=pipeline.denoiser.guidance_scale(float(config.guidance)),
        optimizers=make_optimizers(config, objective),
        ema=config.ema,
        microbatches=settings.microbatches,
        batch_shards=batch_shards(settings.mesh),
        rollout=config.student.rollout,
        steps=config.steps,
    )
    source, null = open_data(config, pipeline)
    frozen = {"null": null} | frozen_networks(config, settings, pipeline, params)
    part = pipeline.folder.components[pipeline.backbone]
    initial_params, untrained = split_frozen(params[pipeline.backbone], part.frozen)
    if config.student.init == "random":
        initial_params = fresh_params(config, pipeline, abstract)
    adapted = loras(config).keys()
    if adapted >= step_spec.optimizers.keys() - {"discriminator"}:
        initial_params = {}  # no network is trained whole
    base = pipeline.backbone if adapted else "untrained"  # adapters are on all of the teacher
    frozen |= {"untrained": untrained} if untrained and not adapted else {}
    complete = merge_params(initial_params, frozen.get(base))
    if objective.needs.tangent or objective.needs.jvp:
        check_tangents(pipeline, frozen, complete)
    return Run(
        config=config,
        teacher=config.teacher,
        seed=config.seed,
        batch=config.batch,
        critic_updates=config.critic.updates,
        offload=tuple(config.offload),
        kernels=settings.kernels,
        pipeline=pipeline,
        step_spec=step_spec,
        loop_spec=LoopSpec.from_config(config),
        mesh=settings.mesh,
        source=source,
        frozen=frozen,
        initial_params=initial_params,
        start=state_initializer(config, step_spec, pipeline, frozen, complete),
        fingerprint="" if abstract else fingerprint(tensors_from_params(part.params, part.keymap)),
        inputs={} if abstract else input_fingerprints(config, source),
        base=base,
    )


def fresh_params(config: ConfigDict, pipeline: Pipeline, abstract: bool) -> Params:
    """Randomly initialised parameters of the backbone, without those that are never trained.

    Args:
      config: training config.
      pipeline: the teacher's pipeline.
      abstract: shapes in place of the parameters.
    """
    network = pipeline.networks[pipeline.backbone]
    fresh = network.abstract if abstract else random_params(network, config.seed)
    return split_frozen(fresh, pipeline.folder.components[pipeline.backbone].frozen)[0]


def make_optimizers(config: ConfigDict, objective: Term) -> dict[str, optax.GradientTransformation]:
    """Optimizers by role: the student's, and those of the networks that the objective trains."""
    optimizers = {"student": make_optimizer(config.optim)}
    for role in CRITICS:
        if getattr(objective.needs, role):
            optimizers[role] = make_optimizer(critic_optim(config), config.critic.updates)
    return optimizers


def frozen_networks(
    config: ConfigDict, settings: Settings, pipeline: Pipeline, params: dict[str, Params]
) -> dict[str, Params]:
    """Parameters, in the compute dtype, of the networks that a run reads and does not train."""
    needs, data = settings.objective.needs, config.data
    encodes_text = not (data.embeddings or data.latents)
    is_needed = {
        pipeline.backbone: needs.uses_teacher or loras(config),
        **dict.fromkeys(pipeline.folder.text_encoders, encodes_text),
        "vae": needs.images and not data.latents or config.preview.every,
    }
    return {name: cast(params[name], settings.dtype) for name, yes in is_needed.items() if yes}


def state_initializer(
    config: ConfigDict,
    step_spec: StepSpec,
    pipeline: Pipeline,
    frozen: dict[str, Any],
    complete: Params,
) -> Callable[[Params], TrainState]:
    """Function of the initial parameters that returns the state at step 0, in float32.

    Args:
      config: training config.
      step_spec: the step's specification.
      pipeline, frozen, complete: as `lower_abstract` takes them.

    Raises: InputError for a discriminator of a network without features.
    """
    objective, optimizers = step_spec.objective, step_spec.optimizers
    if "discriminator" in optimizers:
        width = feature_width(pipeline, frozen, complete)
    key = make_key(config.seed)
    abstract = pipeline.networks[pipeline.backbone].abstract
    adapters = {role: abstract_adapters(abstract, lora) for role, lora in loras(config).items()}

    def start(initial_params: Params) -> TrainState:
        initial_params = cast(initial_params, jnp.float32)
        roles = {
            role: init_adapters(jax.random.fold_in(key, number), adapters[role])
            if role in adapters
            else jax.tree.map(jnp.copy, initial_params)
            for number, role in enumerate(optimizers)
            if role != "discriminator"
        }
        if "discriminator" in optimizers:
            roles["discriminator"] = objective.init_discriminator(key, width)
        return create_state(roles, optimizers)

    return start
