"""Checkpoints: asynchronous saves, checksums against bit rot, restores onto any mesh.

A step is a folder that Orbax commits by an atomic rename; on an object store, by a last file in it.
Orbax does not detect flipped bits, so every step has a manifest with size and checksum of its
files. It is written just before the commit, so that every committed step has one, and finalized
after it with the files of the commit itself.
"""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gadjax.checkpoints.leaves import check_leaves, leaves_by_name, nested_dict
from gadjax.checkpoints.steps import committed_steps, latest_valid_step
from gadjax.errors import InputError, RunStopped, check_choice
from gadjax.io.manifest import finalize_manifest, verify, write_manifest
from gadjax.io.storage import absolute, is_remote, move, write_errors
from gadjax.parallel.sharding import path_name
from gadjax.runtime.distributed import any_process, broadcast_from_first, is_lost_peer
from gadjax.types import Params, PyTree

DAMAGED = "damaged"  # folder for steps that a restore skipped
PARTS = {"ema": ("ema",), "student": ("params", "student"), "critic": ("params", "critic")}

log = logging.getLogger(__name__)


class SaveFailed(RunStopped):
    """A checkpoint could not be written; earlier ones are unchanged."""


class Checkpoints:
    """Checkpoints of one run. Every process must call every method, in the same order.

    Attributes:
      folder: folder of the steps.
      pending: the step being written, until `wait` or the next save has waited for it.
      keep: number of newest steps that are kept.
    """

    def __init__(self, folder: Path, *, keep: int = 3):
        """Open or create the folder. keep: number of newest steps that are kept.

        Raises: RunStopped where the folder cannot be created.
        """
        logging.getLogger("absl").addFilter(_not_orbax_error)
        self.folder, self.write_errors = absolute(folder), write_errors(folder)
        self.pending: int | None = None
        self.keep, self.broken = keep, False
        try:
            self.manager = self._open()
        except self.write_errors as error:
            raise RunStopped(f"{self.folder}: cannot be written: {_line(error)}") from error

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(self.keep),
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # a damaged step must not prevent listing the others
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step: int, state: PyTree, meta: dict) -> None:
        """Write a step in the background, after waiting for the previous save.

        An existing step is kept. Returns once `state` may be donated.

        Args:
          step: number of the step.
          state: training state, sharded.
          meta: any JSON value.

        Raises: SaveFailed where this save or the previous one cannot be written; the next save may
          succeed again.
        """
        self.wait()
        if step in self.manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(nested_dict(state)), meta=ocp.args.JsonSave(meta)
        )
        self.pending = step
        with self._collective_failure():
            self._reopen()
            saved = self.manager.save(step, args=args)
        if not saved:  # Orbax refuses a step older than the newest
            self.pending, newest = None, self.manager.latest_step()
            raise RunStopped(f"{self.folder}: found step {newest}; expected none after {step}")

    def restore(self, abstract: PyTree) -> tuple[int, PyTree, dict] | None:
        """Restore the latest valid step.

        A step without a manifest, or that does not match it, is logged by path and file, skipped,
        and moved to `damaged/` once another one was restored, since training will write that step
        again.

        Args:
          abstract: ShapeDtypeStruct leaves, each with its sharding on the mesh to restore onto.

        Returns: (step, state, meta), or None where there are no checkpoints.
        Raises: InputError naming a leaf that is absent from the checkpoint, or has another shape or
          dtype (Orbax would cast); RunStopped where there are checkpoints but no valid one.
        """
        self.wait()
        step, skipped = None, []
        if jax.process_index() == 0:  # reads for the checksums; the others follow it
            step, skipped = latest_valid_step(self.folder)
        step = broadcast_from_first(-1 if step is None else step)
        if step < 0:
            if broadcast_from_first(len(skipped)):
                raise RunStopped(_no_valid_step(self.folder, skipped))
            return None
        path = self.folder / str(step)
        state, meta = read_state(path, abstract)
        self._move_damaged(skipped)
        # A run that died between a commit and the removal of old steps left one too many.
        for old in sorted(self.manager.all_steps())[: -self.keep]:
            self.manager.delete(old)
        return step, state, meta

    def wait(self) -> None:
        """Wait until the last save is committed. Raises: SaveFailed if it could not be written."""
        if self.pending is None:
            return
        with self._collective_failure():
            self._finish()
        self.pending = None

    def close(self) -> None:
        """Wait for the last save without the other processes, and release the threads."""
        try:
            self._finish()
            self.manager.close()
        except self.write_errors as error:
            raise self._failed(error) from error

    def _finish(self) -> None:
        self.manager.wait_until_finished()
        if self.pending is not None and jax.process_index() == 0:
            path = self.folder / str(self.pending)
            # Orbax reports nothing about a save whose tasks were cancelled.
            if self.folder.is_dir() and not path.is_dir():
                raise OSError(errno.ECANCELED, "Orbax cancelled the save")
            finalize_manifest(path)

    @contextmanager
    def _collective_failure(self) -> Iterator[None]:
        """Turn a write error on any process into SaveFailed on all of them.

        Orbax's manager is replaced after a failure: it has forgotten steps that it was about to
        delete, and a new one removes the partial save, which may be filling the disk.
        """
        error = None
        try:
            yield
        except self.write_errors as caught:
            error = caught
            if is_lost_peer(error):
                raise self._failed(error) from error
        if not any_process(error is not None):
            return
        failed = self._failed(error or OSError(errno.EIO, "it failed in another process"))
        self.pending, self.broken = None, True
        with suppress(*self.write_errors):
            self._reopen()
        raise failed from error

    def _reopen(self) -> None:
        """Replace Orbax's manager after a failure.

        Raises: OSError where the folder is gone: Orbax would create it again, below a lost mount.
        """
        if not is_remote(self.folder) and not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder is gone")
        if self.broken:
            with suppress(*self.write_errors):
                self.manager.close()
            self.manager, self.broken = self._open(), False

    def _failed(self, error: Exception) -> SaveFailed:
        return SaveFailed(f"{self.folder}/{self.pending}: cannot be written: {_line(error)}")

    def _write_manifest(self) -> None:
        """Callback of Orbax in the background on process 0, after the files, before the commit."""
        temporary = sorted(self.folder.glob(f"{self.pending}.orbax-checkpoint-tmp*"))
        for path in temporary or [self.folder / str(self.pending)]:
            write_manifest(path)

    def _move_damaged(self, skipped: list[Path]) -> None:
        if not broadcast_from_first(len(skipped)):
            return
        if jax.process_index() == 0:
            # On an object store Orbax removes everything that is not a committed step.
            remote = is_remote(self.folder)
            damaged = (self.folder.parent if remote else self.folder) / DAMAGED
            damaged.mkdir(exist_ok=True)
            for path in skipped:
                target, copy = damaged / path.name, 1
                while target.exists():
                    target, copy = target.with_name(f"{path.name}.{copy}"), copy + 1
                move(path, target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("gadjax damaged checkpoints moved")
        self.manager.reload()


def read_state(path: Path, abstract: PyTree) -> tuple[PyTree, dict]:
    """Restore state and meta of the valid step in `path`.

    abstract, and what is raised: as `Checkpoints.restore`.
    """
    with _restoring(path):
        check_leaves(path, leaves_by_name(_metadata(path)), leaves_by_name(abstract))
        args = ocp.args.StandardRestore(nested_dict(abstract))
        leaves = leaves_by_name(ocp.StandardCheckpointHandler().restore(path / "state", args=args))
        state = jax.tree_util.tree_map_with_path(lambda p, _: leaves[path_name(p)], abstract)
        return state, _read_meta(path)


def read_params(
    folder: Path, part: str = "ema", step: int | None = None
) -> tuple[int, Params, dict]:
    """Read the parameters of one network from a run's checkpoints.

    Needs no mesh and no model, and reads no other arrays (but every file, for the checksums).

    Args:
      folder: folder of the checkpoints.
      part: "ema", "student" or "critic".
      step: number of the step; None: the latest valid one.

    Returns: (step, nested dict of numpy arrays, meta).
    Raises: InputError where there is no such checkpoint or part, or where `step` is damaged;
      RunStopped where there are checkpoints but no valid one.
    """
    folder = absolute(folder)
    check_choice("part", part, PARTS)
    steps = committed_steps(folder)
    if not steps or step is not None and step not in steps:
        listed = ", ".join(map(str, steps)) or "no checkpoint"
        raise InputError(f"{folder}: found {listed}; expected {'one' if step is None else step}")
    if step is not None and (fault := verify(folder / str(step))):
        raise InputError(f"{folder / str(step)}: found a damaged checkpoint ({fault})")
    if step is None:
        step, skipped = latest_valid_step(folder)
    if step is None:
        raise RunStopped(_no_valid_step(folder, skipped))
    path = folder / str(step)
    with _restoring(path):
        return step, _read_part(path, part), _read_meta(path)


def _read_part(path: Path, part: str) -> Params:
    item: Any = _metadata(path)
    for name in PARTS[part]:
        item = item.get(name, {})
    if not item:
        raise InputError(f"{path}: found no {part}; expected a run that trains one")
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    for name in reversed(PARTS[part]):
        item, args = {name: item}, {name: args}
    handler = ocp.PyTreeCheckpointHandler()
    params = handler.restore(
        path / "state", args=ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)
    )
    for name in PARTS[part]:
        params = params[name]
    return params


def _read_meta(path: Path) -> dict:
    return ocp.JsonCheckpointHandler().restore(path / "meta", args=ocp.args.JsonRestore())


def _metadata(path: Path) -> dict[str, Any]:
    """Shapes and dtypes of a step's leaves, nested."""
    return ocp.PyTreeCheckpointHandler().metadata(path / "state").tree


@contextmanager
def _restoring(path: Path) -> Iterator[None]:
    """Turn an exception while restoring into RunStopped.

    The checksums match, so the cause is memory, storage or the caller.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise RunStopped(f"{path}: cannot be restored: {_line(error)}") from error


def _no_valid_step(folder: Path, skipped: list[Path]) -> str:
    steps = ", ".join(path.name for path in skipped) or "only damaged ones"
    return f"{folder}: found damaged checkpoints ({steps}); expected a valid one"


def _line(error: Exception) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    for reason in ("No space left on device", "Disk quota exceeded", "Permission denied"):
        if reason in text:  # within a long message of Orbax
            return reason
    return text[:200] or type(error).__name__


def _not_orbax_error(record: logging.LogRecord) -> bool:
    """Log filter: drop Orbax's tracebacks of errors that it also raises."""
    return record.levelno < logging.ERROR or "orbax" not in Path(record.pathname).parts
