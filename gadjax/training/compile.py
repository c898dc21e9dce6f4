"""Compiled updates: sharded, jitted functions of state, frozen networks and host arrays."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from gadjax.models.adapters import adapter_rules
from gadjax.models.params import merge_params
from gadjax.parallel.placement import Placement, constrain_batch, current_placement
from gadjax.parallel.sharding import (
    DISCRIMINATOR_RULES,
    batch_sharding,
    in_host_memory,
    replicated,
    shardings,
)
from gadjax.seeds import make_key
from gadjax.training.batch import make_batch
from gadjax.training.setup import Run
from gadjax.training.state import StepSpec, TrainState
from gadjax.training.steps import critic_step, student_step
from gadjax.types import Params


def with_base(step_spec: StepSpec, base: Params | None) -> StepSpec:
    """StepSpec for trained parameters alone; they are merged into the frozen base at every call."""
    if base is None:
        return step_spec
    denoiser = step_spec.denoiser

    def merged(f):
        return f and (lambda params, *arguments: f(merge_params(params, base), *arguments))

    changed = {name: merged(getattr(denoiser, name)) for name in ("apply", "features", "text_kv")}
    return replace(step_spec, denoiser=replace(denoiser, **changed))


@dataclass(frozen=True)
class Steps:
    """Compiled updates, and the shardings of state and frozen networks.

    Attributes:
      student: the student's update.
      critic: the update of critic and discriminator; None where neither is trained.
      order: updates of a training step in order: the critic's, then the student's.
      state: shardings of the training state between updates.
      frozen: shardings of the frozen networks between updates.
    """

    student: Callable
    critic: Callable | None
    order: tuple[Callable, ...]
    state: Any
    frozen: Any


def run_shardings(run: Run) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """Shardings of the state and of the frozen networks between updates, by the families' rules;
    what is offloaded is in host memory. The third: the frozen networks' on the devices."""
    mesh, parts = run.mesh, run.pipeline.folder.components
    backbone, offloaded = run.pipeline.backbone, run.offload
    of_backbone = parts[backbone].family.rules
    rules = DISCRIMINATOR_RULES + of_backbone + adapter_rules(of_backbone)
    state = shardings(jax.eval_shape(run.start, run.initial_params), rules, mesh)
    on_device = {
        name: shardings(tree, parts[backbone if name == "untrained" else name].family.rules, mesh)
        if name in parts or name == "untrained"
        else jax.tree.map(lambda _: replicated(mesh), tree)
        for name, tree in run.frozen.items()
    }
    frozen = on_device
    if "teacher" in offloaded:
        frozen = on_device | {backbone: in_host_memory(on_device[backbone])}
    if "optimizer" in offloaded:
        state = state._replace(opt=in_host_memory(state.opt))
    if "ema" in offloaded:
        state = state._replace(ema=in_host_memory(state.ema))
    return state, frozen, on_device


def compile_steps(
    run: Run, *, keep_unused: bool = False, wrap: Callable[[Callable], Callable] = lambda step: step
) -> Steps:
    """Both updates as sharded jitted functions; the state is donated, the frozen networks are not.

    Args:
      run: a prepared run.
      keep_unused: keep arguments that an update does not read, as `jax.jit` does.
      wrap: transformation of an update before it is compiled (`instrument`).
    """
    mesh, backbone = run.mesh, run.pipeline.backbone
    state_sharding, frozen_sharding, frozen_on_device = run_shardings(run)
    options = {
        "in_shardings": (state_sharding, frozen_sharding, batch_sharding(mesh), replicated(mesh)),
        "out_shardings": (state_sharding, replicated(mesh)),
        "donate_argnums": 0,
        "keep_unused": keep_unused,
    }

    def compile_update(step):
        def update(state, frozen, raw, number):
            if "teacher" in run.offload:
                frozen = jax.device_put(frozen, frozen_on_device)
            with current_placement(Placement(mesh, run.kernels)):
                batch = constrain_batch(
                    make_batch(run.pipeline, frozen, raw, make_key(run.seed), number)
                )
                step_spec = with_base(run.step_spec, frozen.get(run.base))
                return wrap(step)(step_spec, state, frozen.get(backbone), batch)

        update.__name__ = step.__name__  # its name in profiles
        return jax.jit(update, **options)

    critic = compile_update(critic_step) if len(run.step_spec.optimizers) > 1 else None
    student = compile_update(student_step)
    order = (critic,) * (run.critic_updates if critic else 0) + (student,)
    return Steps(student, critic, order, state_sharding, frozen_sharding)
