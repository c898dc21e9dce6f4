"""Record of a run in run.json: devices, versions, settings and the FLOPs of a step."""

import json
import os
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import jax

from gadjax.io.storage import warn_on_write_error, write_atomic
from gadjax.ops.flops import jaxpr_flops
from gadjax.parallel.hardware import peak_flops
from gadjax.training.compile import Steps
from gadjax.training.setup import Run

RUN = "run.json"
VARIABLES = "JAX_", "XLA_", "LIBTPU_"  # prefixes of environment variables
PACKAGES = "gadjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"


def write_record(run: Run, steps: Steps, workdir: Path, *arguments) -> None:
    """Write run.json: devices, versions, and the FLOPs of a step, the critic's updates included.

    Args:
      run: the prepared run.
      steps: its compiled updates.
      workdir: folder of run.json.
      *arguments: arguments of an update's call (state, frozen, batch, number), so that its cached
        trace is counted and nothing is traced twice.

    Raises: RunStopped if it cannot be written, in a local workdir with `checkpoint.failures` 0.
    """
    calls = Counter(steps.order)
    flops = sum(n * jaxpr_flops(step.trace(*arguments).jaxpr.jaxpr) for step, n in calls.items())
    kind = jax.devices()[0].device_kind
    record = {
        "devices": jax.device_count(),
        "device": kind,
        "processes": jax.process_count(),
        "flops_per_step": flops,
        "peak_flops": peak_flops(kind),  # of one device
        "images_per_step": run.batch,
        # Settings from outside; those that `pinned_jax_config` sets have no effect.
        "environment": {
            name: text for name, text in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "versions": {name: version(name) for name in PACKAGES},
    }
    with warn_on_write_error(workdir / RUN, run.loop_spec.failures > 0):
        write_atomic(workdir / RUN, json.dumps(record, indent=2) + "\n")
