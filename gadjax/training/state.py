"""Training state, optimizers, and the static specification of a training step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.rollout import FIRST_ORDER, FreshNoise, Orders
from gadjax.diffusion.samplers import fixed_noise, fresh_noise
from gadjax.objectives.base import Term
from gadjax.types import Params, PyTree


class TrainState(NamedTuple):
    """Training state: all that an update changes. Frozen networks are separate arguments.

    Attributes:
      step: student updates done.
      params: parameters by role (student, critic, discriminator).
      ema: exponential moving average of the student's parameters.
      opt: optimizer state by role.
      bad: skipped updates in a row by role, because something in them was not finite.
      memory: memories of the terms that have one, by the term's name.
    """

    step: jax.Array
    params: dict[str, Params]
    ema: Params
    opt: dict[str, Any]
    bad: dict[str, jax.Array]
    memory: dict[str, PyTree] = {}


def create_state(
    params: dict[str, Params],
    optimizers: dict[str, optax.GradientTransformation],
    memory: dict[str, PyTree] | None = None,
) -> TrainState:
    """Training state at step 0; the EMA is a copy, so that both may be donated.

    Args:
      params: parameters by role.
      optimizers: optimizer by role.
      memory: initial memories of the terms.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params["student"]),
        opt={role: optimizers[role].init(params[role]) for role in params},
        bad={role: jnp.zeros((), jnp.int32) for role in params},
        memory=memory or {},
    )


def make_optimizer(config, updates: int = 1) -> optax.GradientTransformation:
    """AdamW after clipping by global norm, with warm-up and an optional cosine decay.

    Args:
      config: lr, warmup (steps), decay (steps, 0 for none), b1, b2, weight_decay, clip (0: none).
      updates: updates of this network per training step; warmup and decay count the run's steps
        whatever it is.
    """
    warmup, decay = config.warmup * updates, config.decay * updates
    if decay:
        start = 0.0 if warmup else config.lr
        rate = optax.warmup_cosine_decay_schedule(start, config.lr, warmup, decay, config.lr * 0.05)
    elif warmup:
        rate = optax.linear_schedule(0.0, config.lr, warmup)
    else:
        rate = config.lr
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )


@dataclass(frozen=True)
class StepSpec:
    """Static specification of a training step: everything that is fixed when it is traced.

    Attributes:
      denoiser: network, schedule and parameterization of student, teacher and critic.
      objective: weighted sum of terms.
      times: the student's grid; the last entry is the schedule's clean time.
      guidance: the teacher's classifier-free guidance scale.
      optimizers: optimizer by role (student, critic, discriminator).
      ema: decay of the student's moving average per update.
      microbatches: gradient-accumulation steps per update.
      batch_shards: into how many parts the mesh splits a batch.
      rollout: of the student's steps: "ode", or "fresh_noise" or "fixed_noise" (z) on each x0.
      redraw: shares of the span between which the inner times of the grid are drawn anew for every
        sample of an update; () for the grid itself.
      latents: at the drawn steps: "student", from its own rollout, or "data", noised.
      critic_follow: share of the student that the critic takes over after each of its updates.
      steps: student updates of the run.
      trained_steps: first step that the student trains, and the one after the last; () for all.
      student_layers: the teacher's blocks that the student has; () for all.
      decode: (parameters of the autoencoder, latents) -> pictures, for terms that look at them.
    """

    denoiser: Denoiser
    objective: Term
    times: tuple[float, ...]
    guidance: float
    optimizers: dict[str, optax.GradientTransformation]
    ema: float
    microbatches: int = 1
    batch_shards: int = 1
    rollout: str = "ode"
    redraw: tuple[float, ...] = ()
    latents: str = "student"
    critic_follow: float = 0.0
    steps: int = 1
    trained_steps: tuple[int, ...] = ()
    student_layers: tuple[int, ...] = ()
    decode: Callable[[Params, jax.Array], jax.Array] | None = None

    def can_pair(self, samples: int) -> bool:
        """True if neighbours 2j, 2j + 1 of a microbatch of `samples` share a device and grid."""
        return not self.redraw and samples % (2 * self.batch_shards) == 0

    def neighbours(self, samples: int) -> int:
        """Number of neighbours that stay in one microbatch of `samples`: pairs, and blocks of which
        one sample has tangents."""
        tangent = self.objective.needs.tangent
        return math.lcm(2 if self.can_pair(samples) else 1, tangent.one_in if tangent else 1)

    def solver(self, z_BHWC) -> Orders | FreshNoise:
        """Solver of the student's steps from z, as its sampler has it."""
        noises = {"fresh_noise": fresh_noise, "fixed_noise": fixed_noise}
        return noises[self.rollout](z_BHWC) if self.rollout in noises else FIRST_ORDER
