"""Programs in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(*arguments: object, cwd: Path | None = None, **variables: str):
    """A Python program in a process of its own, which must succeed, with its outputs."""
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
