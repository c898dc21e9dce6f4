"""libtpu on a machine without a TPU: only `gadjax plan` should load it, to compile ahead of time.

Unless JAX_PLATFORMS is set, JAX tries to load it all the same: it then logs several lines of
errors, and JAX's profiler ends the process.
"""

import os
import sys
from glob import glob
from importlib.util import find_spec

# Device files by which the kernel exposes a machine's chips.
TPU_DEVICE_GLOBS = "/dev/accel[0-9]*", "/dev/vfio/[0-9]*"
# Without these libtpu searches for a TPU and for other processes that use it.
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
    """Keep JAX from loading libtpu where there is no TPU; to be called before JAX is imported.

    Does nothing where JAX is imported already, where the environment chooses its platform, and
    where there may be a TPU.
    """
    chosen = any(k.startswith("TPU_") for k in os.environ) or os.environ.get("JAX_PLATFORMS")
    if (
        "jax" in sys.modules
        or chosen
        or any(map(glob, TPU_DEVICE_GLOBS))
        or find_spec("libtpu") is None
    ):
        return
    from importlib.metadata import entry_points  # half of the start of a command that needs no JAX

    if find_spec("jax_plugins") is None and not entry_points(group="jax_plugins"):
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:  # a GPU's plugin, for one: JAX chooses
        for key, value in QUIET_ENV.items():
            os.environ.setdefault(key, value)
