"""The two updates as compiled functions of state, frozen networks and a batch of host arrays."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

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
from gadjax.training.checks import select_kernels
from gadjax.training.setup import Run
from gadjax.training.state import StepSpec
from gadjax.training.steps import critic_step, student_step


def with_untrained(step_spec: StepSpec, frozen: dict[str, Any]) -> StepSpec:
    """The recipe for states without the parameters that are never trained."""
    if "untrained" not in frozen:
        return step_spec
    denoiser, untrained = step_spec.denoiser, frozen["untrained"]

    def whole(f):
        return f and (lambda params, *arguments: f(merge_params(params, untrained), *arguments))

    changed = {name: whole(getattr(denoiser, name)) for name in ("apply", "features", "text_kv")}
    return replace(step_spec, denoiser=replace(denoiser, **changed))


@dataclass(frozen=True)
class Steps:
    """The compiled updates and where the state lives."""

    student: Callable
    critic: Callable | None
    order: tuple[Callable, ...]  # the updates of a training step: the critic's, the student's
    state: Any  # shardings
    frozen: Any


def compile_steps(
    run: Run, *, keep_unused: bool = False, wrap: Callable[[Callable], Callable] = lambda step: step
) -> Steps:
    """Both updates as sharded jitted functions; the state is donated, the frozen parts are not.

    keep_unused: whether an update keeps what it does not read among its arguments. wrap: what is
    made of an update before it is compiled.
    """
    mesh, seed = run.mesh, run.config.seed
    parts = run.pipeline.folder.components
    backbone = run.pipeline.backbone
    rules = DISCRIMINATOR_RULES + parts[backbone].module.RULES
    state_sh = shardings(jax.eval_shape(run.start, run.initial_params), rules, mesh)
    frozen_sh = {
        name: shardings(tree, parts[backbone if name == "untrained" else name].module.RULES, mesh)
        if name in parts or name == "untrained"
        else jax.tree.map(lambda _: replicated(mesh), tree)
        for name, tree in run.frozen.items()
    }
    kernels = select_kernels(run.config.attention, mesh, run.config.dtype)
    away = run.config.offload
    state_home, frozen_home = state_sh, frozen_sh
    if "teacher" in away:
        frozen_home = frozen_sh | {backbone: in_host_memory(frozen_sh[backbone])}
    if "optimizer" in away:
        state_home = state_home._replace(opt=in_host_memory(state_sh.opt))
    if "ema" in away:
        state_home = state_home._replace(ema=in_host_memory(state_sh.ema))
    options = {
        "in_shardings": (state_home, frozen_home, batch_sharding(mesh), replicated(mesh)),
        "out_shardings": (state_home, replicated(mesh)),
        "donate_argnums": 0,
        "keep_unused": keep_unused,
    }

    def compiled(step):
        def update(state, frozen, raw, number):
            if "teacher" in away:
                frozen = jax.device_put(frozen, frozen_sh)
            with current_placement(Placement(mesh, kernels)):
                batch = constrain_batch(
                    make_batch(run.pipeline, frozen, raw, make_key(seed), number)
                )
                step_spec = with_untrained(run.step_spec, frozen)
                return wrap(step)(step_spec, state, frozen.get(backbone), batch)

        update.__name__ = step.__name__  # as profiles call it
        return jax.jit(update, **options)

    critic = compiled(critic_step) if len(run.step_spec.optimizers) > 1 else None
    student = compiled(student_step)
    order = (critic,) * (run.config.critic.updates if critic else 0) + (student,)
    return Steps(student, critic, order, state_home, frozen_home)
