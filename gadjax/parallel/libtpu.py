"""libtpu on a machine without a TPU: `gadjax plan` compiles with it, and nothing else should.

JAX tries it all the same where JAX_PLATFORMS does not say otherwise: it then complains in several
lines, and JAX's profiler ends the process.
"""

import os
import sys
from glob import glob
from importlib.metadata import entry_points
from importlib.util import find_spec

TPU_DEVICE_GLOBS = (
    "/dev/accel[0-9]*",
    "/dev/vfio/[0-9]*",
)  # the chips of a machine, as its kernel shows them
# libtpu looks for a TPU, and for the others that use it, unless it is told.
QUIET_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def disable_without_tpu() -> None:
    """Before JAX starts. Does nothing in a program that has JAX already, or that says itself what
    JAX computes on, and where there may be a TPU."""
    chosen = any(k.startswith("TPU_") for k in os.environ) or os.environ.get("JAX_PLATFORMS")
    if (
        "jax" in sys.modules
        or chosen
        or any(map(glob, TPU_DEVICE_GLOBS))
        or find_spec("libtpu") is None
    ):
        return
    if find_spec("jax_plugins") is None and not entry_points(group="jax_plugins"):
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:  # of a GPU, say: JAX chooses
        for key, value in QUIET_ENV.items():
            os.environ.setdefault(key, value)
