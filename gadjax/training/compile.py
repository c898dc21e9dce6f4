"""The two updates as compiled functions of state, frozen networks and a batch of host arrays."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from gadjax.models.params import overlay
from gadjax.parallel.placement import Placement, by_sample, placed
from gadjax.parallel.sharding import HEADS, batch_sharding, on_host, replicated, shardings
from gadjax.seeds import make_key
from gadjax.training.batch import make_batch
from gadjax.training.checks import kernels_of
from gadjax.training.setup import Run
from gadjax.training.state import Recipe
from gadjax.training.steps import critic_step, student_step


def keeping(recipe: Recipe, frozen: dict[str, Any]) -> Recipe:
    """The recipe for states without the parameters that are never trained."""
    if "kept" not in frozen:
        return recipe
    denoiser, kept = recipe.denoiser, frozen["kept"]

    def whole(f):
        return f and (lambda params, *arguments: f(overlay(params, kept), *arguments))

    changed = {name: whole(getattr(denoiser, name)) for name in ("apply", "features", "text_kv")}
    return replace(recipe, denoiser=replace(denoiser, **changed))


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
    body = run.pipeline.body
    rules = HEADS + parts[body].module.RULES
    state_sh = shardings(jax.eval_shape(run.start, run.first), rules, mesh)
    frozen_sh = {
        name: shardings(tree, parts[body if name == "kept" else name].module.RULES, mesh)
        if name in parts or name == "kept"
        else jax.tree.map(lambda _: replicated(mesh), tree)
        for name, tree in run.frozen.items()
    }
    kernels = kernels_of(run.config.attention, mesh, run.config.dtype)
    away = run.config.offload
    state_home, frozen_home = state_sh, frozen_sh
    if "teacher" in away:
        frozen_home = frozen_sh | {body: on_host(frozen_sh[body])}
    if "optimizer" in away:
        state_home = state_home._replace(opt=on_host(state_sh.opt))
    if "ema" in away:
        state_home = state_home._replace(ema=on_host(state_sh.ema))
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
            with placed(Placement(mesh, kernels)):
                batch = by_sample(make_batch(run.pipeline, frozen, raw, make_key(seed), number))
                recipe = keeping(run.recipe, frozen)
                return wrap(step)(recipe, state, frozen.get(body), batch)

        update.__name__ = step.__name__  # as profiles call it
        return jax.jit(update, **options)

    critic = compiled(critic_step) if len(run.recipe.optimizers) > 1 else None
    student = compiled(student_step)
    order = (critic,) * (run.config.critic.updates if critic else 0) + (student,)
    return Steps(student, critic, order, state_home, frozen_home)
