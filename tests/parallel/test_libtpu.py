"""libtpu without a TPU is loaded by `gadjax plan` alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASK = """
import importlib.metadata, os, sys
from gadjax.parallel import libtpu
libtpu.TPU_DEVICE_GLOBS = (sys.argv[1],)
libtpu.find_spec = lambda name: name in sys.argv[2:] or None
importlib.metadata.entry_points = lambda group: ()
libtpu.disable_without_tpu()
print(os.environ.get("JAX_PLATFORMS"), os.environ.get("TPU_ACCELERATOR_TYPE"))
"""


def run(*command: str, **env_changes: str) -> subprocess.CompletedProcess:
    """Run a process whose only variables of platforms are `env_changes`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_PLATFORMS", "TPU_"))}
    env |= {"PYTHONPATH": str(ROOT)} | env_changes
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "tpu,installed,env_changes,expected",
    [
        ("none", ("libtpu",), {}, "cpu None"),
        ("none", ("libtpu",), {"JAX_PLATFORMS": ""}, "cpu None"),
        ("none", ("libtpu",), {"JAX_PLATFORMS": "cuda"}, "cuda None"),
        ("none", ("libtpu", "jax_plugins"), {}, "None v5litepod-4"),  # of a GPU
        ("none", (), {}, "None None"),
        ("/*", ("libtpu",), {}, "None None"),
        ("none", ("libtpu",), {"TPU_ACCELERATOR_TYPE": "v5p-8"}, "None v5p-8"),
    ],
)
def test_libtpu_is_disabled_only_without_tpu(tpu, installed, env_changes, expected):
    asked = run("-c", ASK, tpu, *installed, **env_changes)
    assert asked.stdout.strip() == expected, asked.stderr


def test_command_logs_nothing_of_libtpu():
    asked = run("-m", "gadjax", "doctor")
    assert asked.returncode == 0 and "devices: " in asked.stdout
    assert asked.stderr == "" and "libtpu" not in asked.stdout
