"""The steps of a run that its folder of checkpoints holds."""

import logging
import os
from pathlib import Path

from gadjax.errors import RunStopped
from gadjax.io.manifest import COMMIT_MARKER, verify
from gadjax.io.storage import is_remote, list_objects

log = logging.getLogger(__name__)


def committed_steps(folder: Path) -> list[int]:
    """The steps below `folder` that were committed, newest first. Raises: RunStopped."""
    if is_remote(folder):
        names = [
            name.removesuffix(f"/{COMMIT_MARKER}")
            for name in list_objects(folder)
            if COMMIT_MARKER in name
        ]
    else:
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            names = []
        except OSError as error:
            raise RunStopped(f"{folder}: cannot be read: {error.strerror}") from error
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def latest_valid_step(folder: Path, before: int | None = None) -> tuple[int | None, list[Path]]:
    """The newest step (of those before one) that agrees with its seal, and those after it, which do
    not."""
    skipped: list[Path] = []
    for step in (step for step in committed_steps(folder) if before is None or step < before):
        path = folder / str(step)
        fault = verify(path)
        if fault is None:
            return step, skipped
        log.warning("%s: damaged checkpoint skipped: %s", path, fault)
        skipped.append(path)
    return None, skipped
