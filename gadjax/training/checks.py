"""Checks of a training config before its files are read; each raises InputError."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gadjax import assets
from gadjax.errors import InputError, check_choice, short_repr
from gadjax.formats.lora_header import is_lora
from gadjax.objectives import TERMS, build
from gadjax.objectives.base import Needs
from gadjax.objectives.compose import Sum
from gadjax.ops.kernels import KERNEL_MODULES, kernels_validated
from gadjax.parallel.sharding import batch_shards, check_batch, make_mesh
from gadjax.runtime.distributed import any_process
from gadjax.seeds import check_seed
from gadjax.training.config import INITS
from gadjax.training.data import WITH_PICTURES
from gadjax.training.health import check_previews
from gadjax.training.lora import base_source, loras
from gadjax.training.partial import trained_patterns
from gadjax.training.steps import CRITICS
from gadjax.training.trained_steps import check_drawn_steps, check_trained_steps
from gadjax.training.workdir import is_source, is_workdir

OFFLOAD = "teacher", "optimizer", "ema"
ATTENTION = "auto", "jnp", "pallas"
ROLLOUTS = "ode", "fresh_noise", "fixed_noise"
LATENTS = "student", "data"
# Config name -> `remat` of the networks.
REMAT = {"none": False, "results": "results", "block": True}


class Settings(NamedTuple):
    """Typed values of a valid config.

    Attributes:
      times: timesteps at which the student's steps start.
      objective: weighted sum of terms.
      mesh: the run's devices.
      microbatches: gradient-accumulation steps per update.
      dtype: compute dtype.
      remat: rematerialisation, as networks take it.
      kernels: platform of the attention kernels, as `select_kernels` returns it.
      images: the updates read pictures of the data.
    """

    times: tuple[float, ...]
    objective: Sum
    mesh: Mesh
    microbatches: int
    dtype: Any
    remat: bool | str
    kernels: str
    images: bool


def validate(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Settings:
    """Validate whatever of a config can be, before its files are read.

    Args:
      config: training config.
      devices: devices of the mesh; None: all.

    Raises: InputError.
    """
    check_seed(config.seed)
    times = student_times(config)
    check_choice("student.rollout", config.student.rollout, ROLLOUTS)
    check_choice("student.latents", config.student.latents, LATENTS)
    check_redraw(config.student.redraw, times)
    check_trained_steps(config, times)
    objective = build(config.objective, TERMS, times, config.student.rollout)
    mesh = make_mesh(config.mesh, devices)
    microbatches = check_batch(config.batch, config.microbatch or config.batch, mesh)
    check_tangent_share(objective.needs, config.batch // microbatches // batch_shards(mesh))
    if objective.needs.joint and config.batch < 2:
        raise InputError(
            f"batch: found {config.batch}; expected 2 or more, because this loss compares the "
            "samples of a batch"
        )
    if objective.needs.joint and microbatches > 1:
        raise InputError(
            f"microbatch: found {config.microbatch}; expected 0 or the batch's {config.batch}, "
            "because this loss compares the samples of a batch"
        )
    images = objective.needs.images or config.student.latents == "data"
    if images and not any(config.data[name] for name in WITH_PICTURES):
        names = ", ".join(f"data.{name}" for name in WITH_PICTURES)
        raise InputError(f"{names}: found nothing; expected a source of pictures for this loss")
    if (option := objective.needs.override) and not config.data[option]:
        raise InputError(f"data.{option}: found nothing; expected it set for this loss")
    check_drawn_steps(config, objective.needs)
    check_depth(config, objective.needs)
    if not config.teacher:
        raise InputError("teacher: found nothing; expected a diffusers pipeline folder")
    dtype = compute_dtype(config.dtype)
    check_choice("remat", config.remat, REMAT)
    kernels = select_kernels(config.attention, mesh, config.dtype)
    check_offload(config.offload, objective.needs)
    check_schedule("optim", config.optim)
    check_critic(config, objective.needs)
    check_follow(config)
    check_trained(config, objective.needs)
    check_previews(config.preview)
    remat = REMAT[config.remat]
    return Settings(times, objective, mesh, microbatches, dtype, remat, kernels, images)


def check_tangent_share(needs: Needs, samples: int) -> None:
    """Check that blocks of which one sample has tangents divide a device's share of a microbatch.

    Raises: InputError otherwise.
    """
    one_in = needs.tangent.one_in if needs.tangent else 1
    if samples % one_in:
        raise InputError(
            f"objective.gad.one_in: found {one_in}; expected a divisor of {samples}, the samples "
            "of a microbatch that a device (or a group that shares them) has"
        )


def check_critic(config: ConfigDict, needs: Needs) -> None:
    """Check schedule and updates of the networks that the second update trains."""
    roles = [role for role in CRITICS if getattr(needs, role)]
    for role in roles:
        check_schedule(role, critic_optim(config, role))
    if roles and config.critic.updates < 1:
        raise InputError(
            f"critic.updates: found {config.critic.updates}; expected 1 or more, because the "
            f"objective needs a {' and a '.join(roles)}"
        )
    settings = {key: value for key, value in config.discriminator.items() if value is not None}
    if settings and not needs.discriminator:
        key, value = next(iter(settings.items()))
        raise InputError(
            f"discriminator.{key}: found {value}; expected none in a run without a discriminator"
        )
    init = config.critic.init
    if init is not None and not (needs.critic and is_source(init)):
        expected = "a diffusers folder, a LoRA or a workdir" if needs.critic else "none: no critic"
        raise InputError(f"critic.init: found {init!r}; expected {expected}")
    follow = config.critic.follow
    if not 0 <= follow <= 1 or follow and not needs.critic:
        expected = "a share from 0 to 1" if needs.critic else "0 in a run without a critic"
        raise InputError(f"critic.follow: found {follow}; expected {expected}")


def check_follow(config: ConfigDict) -> None:
    """Check adapters and trained parts, and that a critic can take over a share of a student's.

    Raises: InputError as `loras` and `trained_patterns`, and for a critic that follows adapters or
      a part unlike its own.
    """
    adapters, patterns = loras(config), trained_patterns(config)
    alike = all(of.get("student") == of.get("critic") for of in (adapters, patterns))
    same_base = len({base_source(config, role) for role in {*adapters, *patterns}}) < 2
    if config.critic.follow and not (alike and same_base):
        what = "adapters" if adapters else "trained parameters"
        raise InputError(
            f"critic.follow: found {config.critic.follow} and {what} of the student that are not "
            f"the critic's; expected 0, or the same {what} on the teacher"
        )


def check_trained(config: ConfigDict, needs: Needs) -> None:
    """Check that the rest of a network trained in part can be found again by its readers.

    Raises: InputError for a student's start that is no pipeline folder, or a part of no critic.
    """
    init, pattern = config.student.init, config.student.trained
    path = assets.resolve(init)
    if pattern and init not in INITS and (is_lora(path) or is_workdir(path)):
        raise InputError(
            f"student.trained: found {short_repr(pattern)} and student.init {init!r}; expected a "
            "start at a pipeline folder (gadjax export writes one)"
        )
    if config.critic.trained and not needs.critic:
        raise InputError(
            f"critic.trained: found {short_repr(config.critic.trained)}; expected none: no critic"
        )


def check_depth(config: ConfigDict, needs: Needs) -> None:
    """Check that a student of fewer layers is one where a term needs it, and fits the rest.

    Raises: InputError for a term for such students without one, and for adapters or a critic that
      follows, which are of the teacher's depth.
    """
    layers = tuple(config.student.layers)
    if needs.fewer_layers and not layers:
        raise InputError(
            "student.layers: found (); expected numbers of the teacher's blocks, because this loss "
            "is for students of fewer layers"
        )
    if layers and config.critic.follow:
        raise InputError(
            f"critic.follow: found {config.critic.follow} and a student of fewer layers than the "
            "critic; expected 0"
        )
    if layers and "student" in loras(config):
        raise InputError(
            "student.layers: found some of the blocks and adapters on all of them; expected () or "
            "student.lora.rank 0"
        )


def check_redraw(shares: Sequence[float], times: Sequence[float]) -> None:
    """Check the shares of the span between which a student's grid is drawn anew.

    Raises: InputError for anything but () or two shares in order, and for a grid of one step.
    """
    if not shares:
        return
    numbers = len(shares) == 2 and all(isinstance(share, int | float) for share in shares)
    if not numbers or not 0 <= shares[0] < shares[1] <= 1:
        raise InputError(
            f"student.redraw: found {short_repr(tuple(shares))}; expected two shares in order from "
            "0 to 1, or ()"
        )
    if len(times) < 2:
        raise InputError("student.redraw: found one step; expected at least 2, or ()")


def compute_dtype(name: str):
    """Compute dtype by its config name. Raises: InputError for one that is not supported."""
    if name not in ("float32", "bfloat16"):
        raise InputError(f"dtype: found {name!r}; expected 'float32' or 'bfloat16'")
    return jnp.dtype(name)


def student_times(config: ConfigDict) -> tuple[float, ...]:
    """Timesteps at which the student's steps start, in falling order.

    Raises: InputError for a bad `student.init`, `student.steps` or `student.timesteps`.
    """
    times = tuple(float(t) for t in config.student.timesteps)
    init = config.student.init
    if init not in INITS and not is_source(init):
        raise InputError(
            f"student.init: found {init!r}; expected 'teacher', 'random', a diffusers folder, a "
            "LoRA or a workdir of gadjax train"
        )
    if len(times) != config.student.steps or not times:
        raise InputError(
            f"student.steps: found {config.student.steps}; expected the number of "
            f"student.timesteps ({len(times)})"
        )
    if list(times) != sorted(set(times), reverse=True) or times[-1] < 0:
        raise InputError(f"student.timesteps: found {times}; expected falling times from 0 on")
    return times


def critic_optim(config: ConfigDict, role: str) -> ConfigDict:
    """Optimizer settings of the critic or the discriminator.

    What is None for the discriminator is the critic's, and what is None for the critic the
    student's.
    """
    sections = (config.critic, config.discriminator)[: 1 + CRITICS.index(role)]
    settings = dict(config.optim)
    for section in sections:
        settings |= {k: v for k, v in section.items() if k in settings and v is not None}
    return ConfigDict(settings)


def check_schedule(name: str, optim: ConfigDict) -> None:
    """Check a learning-rate schedule. Raises: InputError if decay ends before warm-up does."""
    if optim.decay and optim.decay <= optim.warmup:
        raise InputError(
            f"{name}.decay: found {optim.decay}; expected more steps than the warm-up's "
            f"{optim.warmup}, or 0 for none"
        )


def select_kernels(choice: str, mesh: Mesh, dtype: str) -> str:
    """Platform whose Pallas attention kernels the run uses, "" for attention in plain JAX.

    "auto" validates the GPU kernels first, on every process: on an H200 they are right in bfloat16
    and wrong in float32.

    Args:
      choice: `attention` of the config: auto, jnp or pallas.
      mesh: the run's devices.
      dtype: name of the compute dtype.

    Raises: InputError for an unknown choice, or for kernels that these devices do not have.
    """
    check_choice("attention", choice, ATTENTION)
    platform = mesh.devices.flat[0].platform
    if choice == "pallas" and platform not in KERNEL_MODULES:
        raise InputError(
            f"attention: found 'pallas' on a {platform}; expected one of "
            f"{', '.join(KERNEL_MODULES)}"
        )
    if choice == "jnp" or platform not in KERNEL_MODULES:
        return ""
    if choice == "auto" and platform == "gpu" and mesh.devices.flat[0] in jax.devices():
        return "" if any_process(not kernels_validated(platform, dtype)) else platform
    return platform


def check_offload(names: Sequence[str], needs: Needs) -> None:
    """Check host offload.

    Raises: InputError for an unknown name, a missing teacher, or an average that a loss evaluates.
    """
    for name in names:
        if name not in OFFLOAD:
            raise InputError(f"offload: found {name!r}; expected some of {', '.join(OFFLOAD)}")
    if "teacher" in names and not needs.uses_teacher:
        raise InputError("offload: found 'teacher' in a run without one; expected it left out")
    if "ema" in names and needs.ema:
        raise InputError(
            "offload: found 'ema' and a loss that evaluates the average; expected it left out"
        )
