"""Several processes of one run on this machine, over loopback."""

import os
import subprocess
import sys
from pathlib import Path

from gadjax.training import processes

ROOT = Path(__file__).parents[1]


def start(command: list[str], number: int, count: int, port: int, devices: int, **more: str):
    """One process of a run of `count`, with so many devices of its own."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | more
    if count > 1:
        env |= {
            processes.ADDRESS: f"127.0.0.1:{port}",
            processes.COUNT: str(count),
            processes.NUMBER: str(number),
        }
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **pipe)
