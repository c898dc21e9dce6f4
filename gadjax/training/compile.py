"""Compiled updates: sharded, jitted functions of state, frozen networks and host arrays."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gadjax.formats.diffusers_folder import Component
from gadjax.models.adapters import adapter_rules
from gadjax.models.quantized import quantized_rules
from gadjax.parallel.placement import Placement, constrain_batch, current_placement
from gadjax.parallel.sharding import (
    DISCRIMINATOR_RULES,
    batch_sharding,
    in_host_memory,
    replicated,
    shardings,
)
from gadjax.runtime.settings import pinned_jax_config
from gadjax.seeds import make_key
from gadjax.training.batch import make_batch
from gadjax.training.setup import Run
from gadjax.training.state import TrainState
from gadjax.training.steps import UPDATES


@dataclass(frozen=True)
class Steps:
    """Compiled updates, and the shardings of state and frozen networks.

    Attributes:
      student: the student's update.
      critic: the update of critic and discriminator; None where neither is trained.
      order: updates of a training step in order, as `Run.order` names them.
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
        name: shardings(tree, frozen_rules(parts[name if name in parts else backbone]), mesh)
        if name != "null"
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


def frozen_rules(part: Component) -> tuple:
    """Sharding rules of a frozen network, whose kernels may be 8-bit."""
    rules = part.family.rules
    return quantized_rules(rules) + tuple(rules)


def compile_steps(
    run: Run, *, keep_unused: bool = False, wrap: Callable[[Callable], Callable] = lambda step: step
) -> Steps:
    """Both updates as sharded jitted functions; the state is donated, the frozen networks are not.

    Args:
      run: a prepared run.
      keep_unused: keep arguments that an update does not read, as `jax.jit` does.
      wrap: transformation of an update before it is compiled (`instrument`).
    """
    mesh = run.mesh
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
                return wrap(step)(run.step_spec, state, run.networks(frozen), batch)

        update.__name__ = step.__name__  # its name in profiles
        return jax.jit(update, **options)

    updates = {name: compile_update(UPDATES[name]) for name in dict.fromkeys(run.order)}
    order = tuple(updates[name] for name in run.order)
    return Steps(updates["student"], updates.get("critic"), order, state_sharding, frozen_sharding)


def abstract_batch(run: Run, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `size` samples of the run's source, as shapes with shardings."""
    sample, sharding = run.source.batch(0, 1), batch_sharding(run.mesh)
    return {
        name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=sharding)
        for name, x in sample.items()
    }


@contextmanager
def compiling(run: Run, steps: Steps, state: TrainState, frozen: dict[str, Any]) -> Iterator[None]:
    """Compile both updates in threads during the context, at whose end they are compiled.

    `jax.jit` keeps the programs of what it has lowered, so that the first calls find them. Does
    nothing in a run of several processes, whose GPUs share what they compile, and on a GPU, where
    the compiler times products on the card and nothing else may run there meanwhile.

    Args:
      run: the prepared run.
      steps: its updates.
      state: training state between updates.
      frozen: frozen networks between updates.
    """
    if jax.process_count() > 1 or run.mesh.devices.flat[0].platform == "gpu":
        yield
        return
    arguments = state, frozen, abstract_batch(run, run.batch), np.uint32(0)
    with ThreadPoolExecutor() as pool:
        # XLA releases Python's lock, tracing holds it: another thread would gain nothing there.
        lowered = (step.lower(*arguments) for step in dict.fromkeys(steps.order))
        running = [pool.submit(pinned_jax_config()(update.compile)) for update in lowered]
        yield
        for future in running:
            future.result()
