"""What a config means: networks, recipe and data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gadjax import assets
from gadjax.convert.files import fingerprint
from gadjax.convert.tensors import tensors_from_params
from gadjax.data.source import Source
from gadjax.errors import InputError
from gadjax.geometry import tangent
from gadjax.host.processes import anywhere
from gadjax.models.module import cast, kept_of, overlay
from gadjax.objectives import TERMS, build
from gadjax.ops.kernels import MODULES, proven
from gadjax.ops.placement import POSITIONS, shares
from gadjax.pipeline import Pipeline, load_pipeline, outline_pipeline, random_like
from gadjax.sampling import sampler_and_times
from gadjax.seeds import check_seed, make_key
from gadjax.training.data import WITH_PICTURES, inputs_of, open_data
from gadjax.training.sharding import check_batch, make_mesh
from gadjax.training.state import TrainState, create, make_optimizer
from gadjax.training.steps import CRITICS, Recipe
from gadjax.training.workdir import sampling_of
from gadjax.types import Batch, Cond, Params

OFFLOAD = "teacher", "optimizer", "ema"
ATTENTION = "auto", "jnp", "pallas"
REMAT = {"none": False, "results": "results", "block": True}  # as networks are told


@dataclass(frozen=True)
class Run:
    """What a config means: the recipe, the frozen networks and the data."""

    config: ConfigDict
    pipeline: Pipeline
    recipe: Recipe
    mesh: Mesh
    source: Source
    frozen: dict[str, Any]
    first: Params  # what student and critic start from
    start: Callable[[Params], TrainState]
    fingerprint: str  # of the teacher's transformer
    inputs: dict[str, str] = field(default_factory=dict)  # as `inputs_of`


def prepare(
    config: ConfigDict, *, abstract: bool = False, devices: Sequence[jax.Device] | None = None
) -> Run:
    """Check everything that can be checked, then load. Raises: InputError before device work.

    abstract: from the teacher's configurations alone; parameters are then shapes, and the run can
      be traced and compiled but not carried out. devices: of the mesh; all there are by default.
    """
    check_seed(config.seed)
    if jax.config.jax_disable_jit:
        raise InputError(
            "JAX_DISABLE_JIT: found it set; expected it unset, as compiled updates alone put a "
            "run's state where it belongs"
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
    kernels_of(config.attention, mesh, config.dtype)
    check_offload(config.offload, objective.needs.distils)
    read = outline_pipeline if abstract else load_pipeline
    pipeline, params = read(assets.resolve(config.teacher), dtype=dtype, remat=remat)
    check_sequence(pipeline, mesh)
    sampling = sampling_of(config)
    if pipeline.sampler.renoises:
        raise InputError(
            f"teacher: found the scheduler {pipeline.folder.scheduler['_class_name']}, whose steps "
            "add noise; expected one with deterministic steps"
        )
    if sampling.timesteps is not None:  # it is None where plain denoising trains a teacher
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
    recipe = Recipe(
        denoiser=pipeline.denoiser,
        objective=objective,
        times=(*times, pipeline.denoiser.schedule.clean),
        guidance=pipeline.denoiser.scale_of(float(config.guidance)),
        optimizers=optimizers,
        ema=config.ema,
        microbatches=microbatches,
        shares=shares(mesh),
    )
    data = config.data
    source, null = open_data(config, pipeline)
    frozen = {"null": null} | {
        name: cast(params[name], dtype)
        for name, wanted in (
            (pipeline.body, objective.needs.distils),
            *((name, not (data.embeddings or data.latents)) for name in pipeline.folder.encoders),
            ("vae", objective.needs.images and not data.latents or config.preview.every),
        )
        if wanted
    }

    part = pipeline.folder.components[pipeline.body]
    first, kept = kept_of(params[pipeline.body], part.frozen)
    if config.student.init == "random":
        network = pipeline.networks[pipeline.body]
        fresh = network.abstract if abstract else random_like(network, config.seed)
        first, _ = kept_of(fresh, part.frozen)
    if kept:
        frozen["kept"] = kept

    if objective.needs.tangent or objective.needs.jvp:
        check_tangents(pipeline, frozen, first)
    if objective.needs.discriminator:
        if pipeline.denoiser.features is None:
            raise InputError(
                "objective: found a discriminator; expected a family whose networks show features"
            )
        features = outline(pipeline, frozen, first, pipeline.denoiser.features).out_info
    key = make_key(config.seed)

    def start(first: Params) -> TrainState:
        first = cast(first, jnp.float32)
        roles = {
            role: jax.tree.map(jnp.copy, first) for role in optimizers if role != "discriminator"
        }
        if objective.needs.discriminator:
            roles["discriminator"] = objective.init_discriminator(key, features.shape[-1])
        return create(roles, optimizers)

    identity = "" if abstract else fingerprint(tensors_from_params(part.params, part.keymap))
    inputs = {} if abstract else inputs_of(config, source)
    return Run(config, pipeline, recipe, mesh, source, frozen, first, start, identity, inputs)


def outline(pipeline: Pipeline, frozen: dict[str, Any], params: Params, f: Callable):
    """f(params, x_BHWC, t_B, cond) of one sample traced and lowered, but not compiled."""

    def run(params, frozen):
        params = overlay(params, frozen.get("kept"))
        cond = encode_raw(pipeline, frozen, frozen["null"])
        return f(params, jnp.zeros((1, *pipeline.latent)), jnp.zeros(1), cond)

    return jax.jit(run).lower(*jax.eval_shape(lambda *given: given, params, frozen))


def check_tangents(pipeline: Pipeline, frozen: dict[str, Any], params: Params) -> None:
    """Raises: InputError for a network through which jax.jvp cannot go, as with an attention
    kernel that has no forward derivative."""

    def moved(params, x, t, cond):
        return tangent(lambda x: pipeline.denoiser.raw(params, x, t, cond), x, x)

    try:
        outline(pipeline, frozen, params, moved)
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


def critic_optim(config: ConfigDict) -> ConfigDict:
    """The critic's optimizer settings: its own, and the student's where it has none."""
    own = {key: value for key, value in config.critic.items() if value is not None}
    return ConfigDict(dict(config.optim) | {key: own[key] for key in config.optim if key in own})


def check_schedule(name: str, optim: ConfigDict) -> None:
    """Raises: InputError for a decay that ends before the warm-up does."""
    if optim.decay and optim.decay <= optim.warmup:
        raise InputError(
            f"{name}.decay: found {optim.decay}; expected more steps than the warm-up's "
            f"{optim.warmup}, or 0 for none"
        )


def encode_raw(pipeline: Pipeline, frozen: dict[str, Any], raw: dict[str, jax.Array]) -> Cond:
    """Token ids, or embeddings written ahead of time, to what the denoiser is told."""
    if "text" in raw:
        pooled = raw["pooled"].astype(jnp.float32) if "pooled" in raw else None
        return pipeline.cond(raw["text"].astype(jnp.float32), raw["mask"], pooled)
    return pipeline.encode_text(frozen, raw["ids"], raw["mask"])


def make_batch(
    pipeline: Pipeline, frozen: dict[str, Any], raw: dict[str, jax.Array], key: jax.Array, update
) -> Batch:
    """Host arrays to a Batch. Every sample's key is (the run's, update, its place in the batch)."""

    samples = raw["mask"].shape[0]
    now = jax.random.fold_in(key, update)
    places = jnp.arange(samples)
    keys = jax.vmap(partial(jax.random.fold_in, now))(places)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), pipeline.latent))(
        keys
    )
    null = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (samples, *x.shape[1:])),
        encode_raw(pipeline, frozen, frozen["null"]),
    )
    # Even: neighbours are a pair to `drawn_steps`.
    offset = 2 * jax.random.randint(jax.random.fold_in(now, samples), (), 0, 1 << 20)
    x0 = raw.get("x0")
    if "image" in raw:
        x0 = pipeline.encode_image(frozen["vae"], raw["image"])
    cond = jax.tree.map(lambda x: jax.lax.stop_gradient(x), encode_raw(pipeline, frozen, raw))
    return Batch(cond, null, noise, keys, (places + offset).astype(jnp.int32), x0)


def kernels_of(choice: str, mesh: Mesh, dtype: str) -> str:
    """Whose attention kernels a run takes. Raises: InputError for what its devices do not have.

    "auto" tries those for GPUs first, on every process: on an H200 they are right in bfloat16 and
    wrong in float32.
    """
    if choice not in ATTENTION:
        raise InputError(f"attention: found {choice!r}; expected one of {', '.join(ATTENTION)}")
    platform = mesh.devices.flat[0].platform
    if choice == "pallas" and platform not in MODULES:
        raise InputError(
            f"attention: found 'pallas' on a {platform}; expected one of {', '.join(MODULES)}"
        )
    if choice == "jnp" or platform not in MODULES:
        return ""
    if choice == "auto" and platform == "gpu" and mesh.devices.flat[0] in jax.devices():
        return "" if anywhere(not proven(platform, dtype)) else platform
    return platform


def check_sequence(pipeline: Pipeline, mesh: Mesh) -> None:
    """Raises: InputError for a network that does not take a sample on several devices."""
    module = pipeline.folder.components[pipeline.body].module
    if mesh.shape[POSITIONS] > 1 and (why := getattr(module, "WHOLE", "")):
        raise InputError(
            f"mesh.sequence: found {mesh.shape[POSITIONS]}; expected 1 for a "
            f"{module.CLASS_NAMES[0]}, {why}"
        )


def check_offload(names: Sequence[str], distils: bool) -> None:
    """Raises: InputError for what cannot wait in the host's memory."""
    for name in names:
        if name not in OFFLOAD:
            raise InputError(f"offload: found {name!r}; expected some of {', '.join(OFFLOAD)}")
    if "teacher" in names and not distils:
        raise InputError("offload: found 'teacher' in a run without one; expected it left out")
