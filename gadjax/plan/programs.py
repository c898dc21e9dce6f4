"""Ahead-of-time compilation of a run's two updates, for chips that need not be present."""

import math
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.parallel.hardware import GIB, Topology
from gadjax.parallel.sharding import HOST_MEMORY, replicated, shapes_with_shardings
from gadjax.runtime.settings import pinned_jax_config
from gadjax.training.compile import abstract_batch, compile_steps
from gadjax.training.setup import Run

# Options that shorten compilation, by platform. For TPUs they act on code generation, after buffer
# assignment; for GPUs autotuning is impossible without one; the code for CPUs, which stand in for
# GPUs, is never run.
FAST_COMPILE_OPTIONS = {
    "tpu": {
        "xla_jf_critical_path_scheduler": False,
        "xla_jf_naive_bundle_packer": True,
        "xla_jf_vliw_scheduler": False,
        "xla_tpu_enable_emitter_rolling": True,
    },
    "gpu": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
    "cpu": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
}
# Newer JAX has only optimization_level, which changes the memory that a TPU's program needs.
if hasattr(jax.config, "jax_exec_time_optimization_effort"):
    FAST_COMPILE_OPTIONS["tpu"]["exec_time_optimization_effort"] = -1.0
# As in the training loop: one batch in use and two that are put on the chips ahead of it.
BATCHES_ON_CHIP = 3
# Makes XLA's scheduler take less memory, which has avoided failures of libtpu.
LESS_OVERLAP = "LIBTPU_INIT_ARGS=--xla_tpu_scheduler_percent_shared_memory_limit=10"
UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
NEEDED_SIZE = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available|Used ([\d.]+)([KMGT]) of")
Log = Callable[[str], None]


class Compiled(NamedTuple):
    """Update compiled for one batch, in bytes of a chip. peak: None where the compiler gave up
    without reporting a size."""

    fits: bool
    peak: float | None
    arguments: float | None
    temporary: float | None
    text: str  # HLO, or the compiler's message about memory
    seconds: float


class Programs(NamedTuple):
    """Updates of a run, for any batch, and the chips they are compiled for."""

    run: Run
    steps: dict[str, Any]  # jitted functions by name
    held: tuple[Any, Any]  # state and frozen networks as shapes with shardings
    raw: Callable[[int], dict[str, Any]]  # a batch of the given size, likewise
    target: Topology

    def arguments(self, batch: int) -> tuple:
        """Arguments of an update for a batch, as shapes with shardings."""
        update = jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated(self.run.mesh))
        return *self.held, self.raw(batch), update

    @pinned_jax_config()  # also in a thread
    def compile(self, name: str, batch: int, log: Log) -> Compiled:
        """Compile an update ahead of time.

        Args:
          name: "critic" or "student".
          batch: samples of the whole batch.
          log: called with a line of text.
        Raises: InputError where the compiler fails for another reason than memory.
        """
        log(f"compiling the {name} step, {batch} samples ...")
        options = FAST_COMPILE_OPTIONS[self.run.mesh.devices.flat[0].platform]
        start = time.perf_counter()
        try:
            lowered = self.steps[name].lower(*self.arguments(batch))
            done = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            message = str(error).strip().splitlines()[0]
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise InputError(
                    f"batch: found {batch}, for which the compiler fails on the {name} step "
                    f"({message}); expected another; on TPUs {LESS_OVERLAP} may help"
                ) from error
            seconds = time.perf_counter() - start
            size = NEEDED_SIZE.search(str(error))
            number, unit = [x for x in size.groups() if x] if size else ("", "")
            log(f"the {name} step does not fit ({seconds:.0f} s)")
            peak = float(number) * UNITS[unit] if size else None
            return Compiled(False, peak, None, None, message, seconds)
        seconds = time.perf_counter() - start
        memory = done.memory_analysis()
        arguments = memory.argument_size_in_bytes
        rest = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = (
            arguments
            + rest
            + (BATCHES_ON_CHIP - 1) * sum(map(bytes_per_chip, self.raw(batch).values()))
        )
        log(f"compiled the {name} step in {seconds:.0f} s")
        return Compiled(
            peak <= self.target.chip.memory,
            peak,
            arguments,
            memory.temp_size_in_bytes,
            done.as_text(),
            seconds,
        )


def build_programs(run: Run, target: Topology) -> Programs:
    """Updates of a run as jitted functions, with the shapes and shardings of their arguments."""
    # Arguments that one update does not read lie on the chip all the same: hence keep_unused.
    compiled = compile_steps(run, keep_unused=True)
    steps = {"critic": compiled.critic, "student": compiled.student}
    held = (
        shapes_with_shardings(jax.eval_shape(run.start, run.initial_params), compiled.state),
        shapes_with_shardings(run.frozen, compiled.frozen),
    )
    trained = {name: step for name, step in steps.items() if step}
    return Programs(run, trained, held, partial(abstract_batch, run), target)


def bytes_per_chip(leaf) -> int:
    """Bytes of a leaf in one chip's own memory."""
    if leaf.sharding.memory_kind == HOST_MEMORY:
        return 0
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
