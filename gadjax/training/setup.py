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
from gadjax.errors import InputError
from gadjax.features.network import FolderExtractor
from gadjax.formats.state_dict import tensors_from_params
from gadjax.formats.weights import fingerprint
from gadjax.models.adapters import abstract_adapters, init_adapters
from gadjax.models.params import cast
from gadjax.models.quantized import quantized
from gadjax.objectives import Sum
from gadjax.objectives.base import Term
from gadjax.parallel.placement import batch_shards
from gadjax.pipelines.pipeline import Pipeline, abstract_pipeline, load_pipeline
from gadjax.seeds import make_key
from gadjax.training.checks import Settings, critic_optim, validate
from gadjax.training.data import input_fingerprints, open_data
from gadjax.training.lora import base_source, loras
from gadjax.training.networks import load_networks
from gadjax.training.partial import bases_on_teacher
from gadjax.training.pipeline_checks import check_pipeline, check_tangents, feature_width
from gadjax.training.state import StepSpec, TrainState, create_state, make_optimizer
from gadjax.training.steps import CRITICS, EARLIER
from gadjax.types import Params

CHANNELS = 3  # of pictures


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
      preview_seeds: noises of each of them.
      preview_scale: enlargement of a preview's images.
      stop_when: signals whose alarm stops the run.
    """

    steps: int
    checkpoint_every: int
    keep: int
    failures: int
    stop_after_bad: int
    preview_every: int
    preview_prompts: int
    preview_seeds: int
    preview_scale: int
    stop_when: tuple[str, ...]

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
            preview_seeds=preview.seeds,
            preview_scale=preview.scale,
            stop_when=tuple(preview.stop_when),
        )


@dataclass(frozen=True)
class Run:
    """A prepared run: step specification, frozen networks and data of a config.

    Attributes:
      config: the training config, for records of it; its values are in the other attributes.
      teacher: the config's name of the teacher, for messages.
      seed: of data, noise and initial parameters.
      batch: samples of an update, on all devices together.
      order: the updates of a training step, "critic" (and discriminator) or "student".
      offload: what is in host memory between uses: some of teacher, optimizer, ema.
      kernels: platform of the attention kernels, as `select_kernels` returns it.
      pipeline: the teacher's pipeline.
      step_spec: static specification of its steps.
      loop_spec: specification of the loop around them.
      mesh: the run's devices.
      source: data source.
      frozen: parameters that no update changes, by network; the empty prompt under "null",
        parameters of the backbone that are not trained, where no other key has them, under
        "untrained", and the expert of the student's earlier steps under EARLIER.
      initial_params: initial parameters by role, as `Networks.initial` has them.
      start: initial parameters -> initial training state.
      fingerprint: of the teacher's backbone.
      inputs: fingerprints by key of the config, as `input_fingerprints` returns them.
      sources: name of a frozen network beside the teacher -> its key in `frozen`.
      bases: role -> key in `frozen` of the parameters that it does not train itself.
      extractor: feature network of the previews; None for none.
    """

    config: ConfigDict
    teacher: str
    seed: int
    batch: int
    order: tuple[str, ...]
    offload: tuple[str, ...]
    kernels: str
    pipeline: Pipeline
    step_spec: StepSpec
    loop_spec: LoopSpec
    mesh: Mesh
    source: Source
    frozen: dict[str, Any]
    initial_params: dict[str, Params]
    start: Callable[[dict[str, Params]], TrainState]
    fingerprint: str
    inputs: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)
    extractor: FolderExtractor | None = None

    def networks(self, frozen: dict[str, Any]) -> dict[str, Params]:
        """Frozen networks of an update, as `student_step` takes them."""
        named = {name: frozen[key] for name, key in self.sources.items()}
        bases = {f"{role}/base": self.base(role, frozen) for role in self.bases}
        fixed = {"teacher": frozen.get(self.pipeline.backbone), "vae": frozen.get("vae")}
        if EARLIER in frozen:
            fixed[EARLIER] = frozen[EARLIER]
        return {**fixed, **named, **bases}

    def base(self, role: str, frozen: dict[str, Any]) -> Params | None:
        """Parameters that a role does not train itself; None if it trains all."""
        return frozen.get(self.bases.get(role, "untrained"))


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
    step_spec = make_step_spec(config, settings, pipeline)
    source, null = open_data(config, pipeline)
    frozen = {"null": null} | frozen_networks(config, settings, pipeline, params)
    part = pipeline.folder.components[pipeline.backbone]
    networks = load_networks(config, objective, pipeline, params[pipeline.backbone], abstract)
    for name, tree in networks.frozen.items():
        adapted = name in {networks.bases.get(role) for role in loras(config)}
        frozen[name] = cast(quantized(tree, config.int8) if adapted else tree, settings.dtype)
    roles = step_spec.optimizers.keys() - {"discriminator"} - networks.bases.keys()
    bases, untrained = bases_on_teacher(
        config, roles, pipeline, params[pipeline.backbone], frozen, settings.dtype
    )
    if untrained:
        frozen["untrained"] = untrained
    if objective.needs.tangent or objective.needs.jvp:
        check_tangents(pipeline, frozen, params[pipeline.backbone])
    return Run(
        config=config,
        teacher=config.teacher,
        seed=config.seed,
        batch=config.batch,
        order=update_order(config, objective),
        offload=tuple(config.offload),
        kernels=settings.kernels,
        pipeline=pipeline,
        step_spec=step_spec,
        loop_spec=LoopSpec.from_config(config),
        mesh=settings.mesh,
        source=source,
        frozen=frozen,
        initial_params=networks.initial,
        start=state_initializer(config, step_spec, pipeline, frozen, params[pipeline.backbone]),
        fingerprint="" if abstract else fingerprint(tensors_from_params(part.params, part.keymap)),
        inputs={} if abstract else input_fingerprints(config, source) | networks.fingerprints,
        sources=networks.sources,
        bases=bases | networks.bases,
    )


def make_step_spec(config: ConfigDict, settings: Settings, pipeline: Pipeline) -> StepSpec:
    """Specification of a run's steps. Raises: InputError as `check_pipeline`."""
    return StepSpec(
        denoiser=pipeline.denoiser.with_default_guidance(float(config.student.guidance)),
        objective=settings.objective,
        times=check_pipeline(config, settings, pipeline),
        guidance=pipeline.denoiser.guidance_scale(float(config.guidance)),
        optimizers=make_optimizers(config, settings.objective),
        ema=config.ema,
        microbatches=settings.microbatches,
        batch_shards=batch_shards(settings.mesh),
        rollout=config.student.rollout,
        redraw=tuple(config.student.redraw),
        latents=config.student.latents,
        critic_follow=config.critic.follow,
        steps=config.steps,
        trained_steps=tuple(config.student.trained_steps),
        student_layers=tuple(config.student.layers),
        decode=pipeline.decode_unclipped,
    )


def update_order(config: ConfigDict, objective: Sum) -> tuple[str, ...]:
    """The updates of a training step: those of critic and discriminator together, if there are
    any, before or after the student's one."""
    needs = objective.needs
    critics = ("critic",) * (config.critic.updates if needs.critic or needs.discriminator else 0)
    return (*critics, "student") if config.critic.first else ("student", *critics)


def make_optimizers(config: ConfigDict, objective: Term) -> dict[str, optax.GradientTransformation]:
    """Optimizers by role: the student's, and those of the networks that the objective trains."""
    optimizers = {"student": make_optimizer(config.optim)}
    for role in CRITICS:
        if getattr(objective.needs, role):
            optimizers[role] = make_optimizer(critic_optim(config, role), config.critic.updates)
    return optimizers


def frozen_networks(
    config: ConfigDict, settings: Settings, pipeline: Pipeline, params: dict[str, Params]
) -> dict[str, Params]:
    """Parameters, in the compute dtype, of the networks that a run reads and does not train.

    Raises: InputError as `quantized`, and for 8-bit kernels in a run without a frozen base.
    """
    needs, data = settings.objective.needs, config.data
    trained = {"student", *(role for role in CRITICS if getattr(needs, role))}
    adapted = loras(config).keys() & trained
    on_teacher = any(base_source(config, role) == "teacher" for role in adapted)
    encodes_text = not (data.embeddings or data.latents)
    # The student's start is the teacher itself, held once, unless `student.init` is another or the
    # student has fewer layers.
    is_teacher = config.student.init == "teacher" and not config.student.layers
    named = {"teacher", "start"} if is_teacher else {"teacher"}
    names_teacher = not named.isdisjoint(needs.networks.values())
    is_needed = {
        pipeline.backbone: needs.uses_teacher or names_teacher or on_teacher,
        **dict.fromkeys(pipeline.folder.text_encoders, encodes_text),
        "vae": settings.images and not data.latents or needs.pixels or config.preview.every,
    }
    if is_needed[pipeline.backbone]:
        backbone = quantized(params[pipeline.backbone], config.int8)
        params = params | {pipeline.backbone: backbone}
    elif config.int8 and not adapted:  # adapters on another start: 8 bits of that
        raise InputError(
            f"int8: found {config.int8!r} in a run without a frozen teacher or start; expected none"
        )
    return {name: cast(params[name], settings.dtype) for name, yes in is_needed.items() if yes}


def state_initializer(
    config: ConfigDict,
    step_spec: StepSpec,
    pipeline: Pipeline,
    frozen: dict[str, Any],
    teacher: Params,
) -> Callable[[dict[str, Params]], TrainState]:
    """Function of the initial parameters by network that returns the state at step 0, in float32.

    Args:
      config: training config.
      step_spec: with the objective and the optimizers.
      pipeline, frozen, teacher: for the width of a discriminator's features, if it has such.

    Raises: InputError for a discriminator of a network without features.
    """
    objective, optimizers = step_spec.objective, step_spec.optimizers
    if "discriminator" in optimizers:
        on_pixels = objective.trainer_needs(("discriminator",)).pixels
        width = CHANNELS if on_pixels else feature_width(pipeline, frozen, teacher)
    key = make_key(config.seed)
    abstract = pipeline.networks[pipeline.backbone].abstract
    adapters = {role: abstract_adapters(abstract, lora) for role, lora in loras(config).items()}

    def start(initial_params: dict[str, Params]) -> TrainState:
        initial_params = cast(initial_params, jnp.float32)
        roles = {
            role: init_adapters(jax.random.fold_in(key, number), adapters[role])
            if role in adapters and role not in initial_params
            else jax.tree.map(jnp.copy, initial_params.get(role, initial_params.get("student")))
            for number, role in enumerate(optimizers)
            if role != "discriminator"
        }
        if "discriminator" in optimizers:
            roles["discriminator"] = objective.init_discriminator(key, width)
        return create_state(roles, optimizers, objective.init_memory())

    return start
