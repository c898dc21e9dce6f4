"""Several devices, and several processes of one run, on this machine."""

import os
import subprocess
import sys

from programs import ROOT, run_python

from gadjax.runtime import distributed

# As tests begin: loading libtpu takes those for CPUs away.
XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
TESTS_PATH = os.pathsep.join((str(ROOT), str(ROOT / "tests")))


def flags_for(devices: int) -> str:
    """XLA_FLAGS of a process with so many devices that are none."""
    return f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}".strip()


def variables(devices: int) -> dict[str, str]:
    """Environment of a process with so many devices that are none."""
    return {"XLA_FLAGS": flags_for(devices), "JAX_PLATFORMS": "cpu"}


def start(command: list[str], number: int, count: int, port: int, devices: int, **more: str):
    """One process of a run of `count`, with so many devices of its own."""
    env = os.environ | variables(devices) | more
    if count > 1:
        env |= {
            distributed.ADDRESS: f"127.0.0.1:{port}",
            distributed.COUNT: str(count),
            distributed.NUMBER: str(number),
        }
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **pipe)


def run_on_devices(count: int, file: str, *arguments: object) -> None:
    """A test's own file as a program on so many devices."""
    run_python(file, *arguments, PYTHONPATH=TESTS_PATH, **variables(count))
