"""Committed and valid steps in a run's checkpoint folder."""

import logging
import os
from pathlib import Path

from gadjax.errors import RunStopped
from gadjax.io.manifest import COMMIT_MARKER, verify
from gadjax.io.storage import is_remote, list_objects

log = logging.getLogger(__name__)


def committed_steps(folder: Path) -> list[int]:
    """Committed steps in a checkpoint folder, newest first.

    Raises: RunStopped where the folder cannot be read.
    """
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
    """Latest step whose files match its manifest, and the paths of the damaged steps after it.

    before: consider only steps before this one.
    """
    skipped: list[Path] = []
    for step in (step for step in committed_steps(folder) if before is None or step < before):
        path = folder / str(step)
        fault = verify(path)
        if fault is None:
            return step, skipped
        log.warning("%s: damaged checkpoint skipped: %s", path, fault)
        skipped.append(path)
    return None, skipped
