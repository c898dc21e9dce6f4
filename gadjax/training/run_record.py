"""What a run computes and on what: run.json for whoever looks at its workdir."""

import json
import os
from importlib.metadata import version
from pathlib import Path

import jax

from gadjax.io.storage import warn_on_write_error, write_atomic
from gadjax.ops.flops import jaxpr_flops
from gadjax.parallel.hardware import peak_flops
from gadjax.training.compile import Steps
from gadjax.training.setup import Run

RUN = "run.json"
SETTINGS = "JAX_", "XLA_", "LIBTPU_"  # begin the names of variables
PACKAGES = "gadjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"


def write_record(run: Run, steps: Steps, workdir: Path, *arguments) -> None:
    """Devices, versions, and the FLOPs of one step: a student's update and its critic's.

    arguments: what an update was called with (state, frozen, batch, number), so that the programs
    traced for it are the ones counted and nothing is traced twice.
    Raises: RunStopped where it cannot be written, if that is to stop the run.
    """
    times = {steps.student: 1}
    if steps.critic:
        times[steps.critic] = run.config.critic.updates
    work = sum(n * jaxpr_flops(step.trace(*arguments).jaxpr.jaxpr) for step, n in times.items())
    kind = jax.devices()[0].device_kind
    record = {
        "devices": jax.device_count(),
        "device": kind,
        "processes": jax.process_count(),
        "flops_per_step": work,
        "peak_flops": peak_flops(kind),  # of one device
        "images_per_step": run.config.batch,
        # What JAX was told from outside; of what `pinned_jax_config` sets, nothing is taken.
        "environment": {
            name: text for name, text in sorted(os.environ.items()) if name.startswith(SETTINGS)
        },
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "versions": {name: version(name) for name in PACKAGES},
    }
    with warn_on_write_error(workdir / RUN, run.config.checkpoint.failures > 0):
        write_atomic(workdir / RUN, json.dumps(record, indent=2) + "\n")
