"""Checkpoints of a run: asynchronous saves, checksums against bit rot, restores onto any mesh.

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

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gadjax.checkpoints.leaves import nested_dict
from gadjax.checkpoints.restore import error_line, no_valid_step, read_state
from gadjax.checkpoints.steps import latest_valid_step
from gadjax.errors import RunStopped
from gadjax.io.manifest import finalize_manifest, write_manifest
from gadjax.io.storage import absolute, is_remote, move, write_errors
from gadjax.runtime.distributed import any_process, broadcast_from_first, is_lost_peer
from gadjax.types import PyTree

DAMAGED = "damaged"  # folder for steps that a restore skipped

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
            raise RunStopped(f"{self.folder}: cannot be written: {error_line(error)}") from error

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
                raise RunStopped(no_valid_step(self.folder, skipped))
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
        return SaveFailed(f"{self.folder}/{self.pending}: cannot be written: {error_line(error)}")

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


def _not_orbax_error(record: logging.LogRecord) -> bool:
    """Log filter: drop Orbax's tracebacks of errors that it also raises."""
    return record.levelno < logging.ERROR or "orbax" not in Path(record.pathname).parts
