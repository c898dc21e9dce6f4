"""Real runs of `gadjax train` on a random pipeline, for the scripts here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from tiny_run import write_config, write_pipeline  # noqa: E402

from gadjax.formats.weights import fingerprint  # noqa: E402
from gadjax.io.manifest import verify  # noqa: E402
from gadjax.parallel.sharding import path_name  # noqa: E402


def make_config(folder: Path) -> Path:
    """A config of dmd, gad and anchor on a tiny pipeline below `folder`."""
    return write_config(folder, write_pipeline(folder / "tiny"))


def start(cache: Path, log: Path, *arguments: object) -> subprocess.Popen:
    """`gadjax ARGUMENTS` in a process of its own.

    cache: for what it compiles. log: what it prints is added to this file.
    """
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "gadjax", *map(str, arguments)]
    with log.open("a") as output:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)


def tail(log: Path) -> str:
    """The end of what a process printed, for a message."""
    return log.read_text(errors="replace")[-2000:]


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a killed process may leave one that is not."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().split("\n") if file.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def sound(workdir: Path) -> list[int]:
    """Steps of checkpoints that agree with their manifests."""
    folder = workdir / "checkpoints"
    steps = (int(name) for name in names(folder) if name.isdigit())
    return [step for step in steps if verify(folder / str(step)) is None]


def names(folder: Path) -> list[str]:
    """What lies in a folder, in order; nothing where there is none."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def state_of(workdir: Path) -> str:
    """A hash of every array of the newest checkpoint: parameters, averages, optimizers, counts."""
    path = workdir / "checkpoints" / str(max(sound(workdir))) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    item = handler.metadata(path).tree
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    found = handler.restore(path, args=ocp.args.PyTreeRestore(item, restore_args=how))
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return fingerprint((path_name(where), np.asarray(leaf)) for where, leaf in leaves)
