"""Checkpoints: written in the background, sealed against bit rot, restored onto any mesh.

A step is a folder that Orbax commits by a rename; on an object store, by a last file in it. Orbax
itself notices no flipped bit, so every step carries a seal: the size and a checksum of its files,
written just before the commit, so that a committed step is a sealed one, and completed after it by
the files of the commit itself.
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

from gadjax.checkpoints.leaves import check_leaves, names_of, nested
from gadjax.checkpoints.steps import committed_steps, latest_valid_step
from gadjax.errors import InputError, RunStopped
from gadjax.io.manifest import finalize_manifest, verify, write_manifest
from gadjax.io.storage import absolute, is_remote, move, write_errors
from gadjax.parallel.sharding import path_name
from gadjax.runtime.distributed import any_process, broadcast_from_first, is_lost_peer
from gadjax.types import Params, PyTree

ASIDE = "damaged"  # folder for what a restore skipped
PARTS = {"ema": ("ema",), "student": ("params", "student"), "critic": ("params", "critic")}

log = logging.getLogger(__name__)


class SaveFailed(RunStopped):
    """A checkpoint could not be written; the ones before are as they were."""


class Checkpoints:
    """The checkpoints of one run. Every process calls every method, in the same order.

    saving: the step that is being written, until `wait` or the next save has seen the end of it.
    """

    def __init__(self, folder: Path, *, keep: int = 3):
        """keep: how many of the newest steps stay.

        Raises: RunStopped where the folder cannot be made.
        """
        logging.getLogger("absl").addFilter(_not_orbax_error)
        self.folder, self.write_errors = absolute(folder), write_errors(folder)
        self.saving: int | None = None
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
                lightweight_initialize=True,  # a damaged step must not stop the others' listing
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step: int, state: PyTree, meta: dict) -> None:
        """Write in the background, after the save before has ended. A step already there stays.

        Returns once `state` may be donated. meta: anything JSON holds.
        Raises: SaveFailed where this save, or the one before, cannot be written; the next may go
        well again.
        """
        self.wait()
        if step in self.manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(nested(state)), meta=ocp.args.JsonSave(meta)
        )
        self.saving = step
        with self._failing():
            self._mend()
            saved = self.manager.save(step, args=args)
        if not saved:  # Orbax's way of refusing a step older than the newest
            self.saving, newest = None, self.manager.latest_step()
            raise RunStopped(f"{self.folder}: found step {newest}; expected none after {step}")

    def restore(self, abstract: PyTree) -> tuple[int, PyTree, dict] | None:
        """The newest sound step as (step, state, meta), or None where there are no checkpoints.

        abstract: ShapeDtypeStruct leaves, each with its sharding on the mesh to restore onto. A
        step without a seal, or that contradicts it, is logged by path and file, skipped, and moved
        to `damaged/` once another one was restored, since training will write that step again.
        Raises: InputError naming a leaf that the checkpoint has not, or has in another shape or
        dtype (Orbax would cast); RunStopped where there are checkpoints but no sound one.
        """
        self.wait()
        step, skipped = None, []
        if jax.process_index() == 0:  # which reads for the seals; the others follow it
            step, skipped = latest_valid_step(self.folder)
        step = broadcast_from_first(-1 if step is None else step)
        if step < 0:
            if broadcast_from_first(len(skipped)):
                raise RunStopped(_none_sound(self.folder, skipped))
            return None
        path = self.folder / str(step)
        state, meta = read_state(path, abstract)
        self._set_aside(skipped)
        # A run that died between a commit and what it removes has one too many.
        for old in sorted(self.manager.all_steps())[: -self.keep]:
            self.manager.delete(old)
        return step, state, meta

    def wait(self) -> None:
        """Until the last save is committed. Raises: SaveFailed where it could not be written."""
        if self.saving is None:
            return
        with self._failing():
            self._finish()
        self.saving = None

    def close(self) -> None:
        """`wait` without the other processes, and give up the threads."""
        try:
            self._finish()
            self.manager.close()
        except self.write_errors as error:
            raise self._failed(error) from error

    def _finish(self) -> None:
        self.manager.wait_until_finished()
        if self.saving is not None and jax.process_index() == 0:
            path = self.folder / str(self.saving)
            # Of a save whose tasks were cancelled Orbax says nothing.
            if self.folder.is_dir() and not path.is_dir():
                raise OSError(errno.ECANCELED, "Orbax gave it up")
            finalize_manifest(path)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What fails inside on one process is a failed save on every one.

        Orbax's manager is replaced after it: it has forgotten steps that it was about to delete,
        and a new one removes what the save has left, which fills a full disk.
        """
        error = None
        try:
            yield
        except self.write_errors as found:
            error = found
            if is_lost_peer(error):
                raise self._failed(error) from error
        if not any_process(error is not None):
            return
        failed = self._failed(error or OSError(errno.EIO, "it failed in another process"))
        self.saving, self.broken = None, True
        with suppress(*self.write_errors):
            self._mend()
        raise failed from error

    def _mend(self) -> None:
        """Raises: OSError where the folder is gone, which Orbax would make anew: beneath the mount
        that was lost."""
        if not is_remote(self.folder) and not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder is gone")
        if self.broken:
            with suppress(*self.write_errors):
                self.manager.close()
            self.manager, self.broken = self._open(), False

    def _failed(self, error: Exception) -> SaveFailed:
        return SaveFailed(f"{self.folder}/{self.saving}: cannot be written: {_line(error)}")

    def _seal(self) -> None:
        """Orbax calls it in the background on process 0, after the files, before the commit."""
        temporary = sorted(self.folder.glob(f"{self.saving}.orbax-checkpoint-tmp*"))
        for path in temporary or [self.folder / str(self.saving)]:
            write_manifest(path)

    def _set_aside(self, skipped: list[Path]) -> None:
        if not broadcast_from_first(len(skipped)):
            return
        if jax.process_index() == 0:
            remote = is_remote(self.folder)  # where Orbax removes what is not a committed step
            aside = (self.folder.parent if remote else self.folder) / ASIDE
            aside.mkdir(exist_ok=True)
            for path in skipped:
                place, copy = aside / path.name, 1
                while place.exists():
                    place, copy = place.with_name(f"{path.name}.{copy}"), copy + 1
                move(path, place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("gadjax set aside")
        self.manager.reload()


def read_state(path: Path, abstract: PyTree) -> tuple[PyTree, dict]:
    """State and meta of the step in `path`, a sound one. abstract, raises: as `restore` has it."""
    with _restoring(path):
        check_leaves(path, names_of(_metadata(path)), names_of(abstract))
        args = ocp.args.StandardRestore(nested(abstract))
        leaves = names_of(ocp.StandardCheckpointHandler().restore(path / "state", args=args))
        state = jax.tree_util.tree_map_with_path(lambda p, _: leaves[path_name(p)], abstract)
        return state, _read_meta(path)


def read_params(
    folder: Path, part: str = "ema", step: int | None = None
) -> tuple[int, Params, dict]:
    """One network out of a run's checkpoints: (step, nested dict of numpy arrays, meta).

    Needs no mesh and no model, and reads no other arrays (though every file, for the seal).
    part: ema, student or critic. step: by default the newest sound one.
    Raises: InputError where there is no such checkpoint or part, or where `step` is damaged;
    RunStopped where there are checkpoints but no sound one.
    """
    folder = absolute(folder)
    if part not in PARTS:
        raise InputError(f"part: found {part!r}; expected one of {', '.join(PARTS)}")
    steps = committed_steps(folder)
    if not steps or step is not None and step not in steps:
        found = ", ".join(map(str, steps)) or "no checkpoint"
        raise InputError(f"{folder}: found {found}; expected {'one' if step is None else step}")
    if step is not None and (fault := verify(folder / str(step))):
        raise InputError(f"{folder / str(step)}: found a damaged checkpoint ({fault})")
    if step is None:
        step, skipped = latest_valid_step(folder)
    if step is None:
        raise RunStopped(_none_sound(folder, skipped))
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
    found = handler.restore(
        path / "state", args=ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)
    )
    for name in PARTS[part]:
        found = found[name]
    return found


def _read_meta(path: Path) -> dict:
    return ocp.JsonCheckpointHandler().restore(path / "meta", args=ocp.args.JsonRestore())


def _metadata(path: Path) -> dict[str, Any]:
    """Shapes and dtypes of a step, nested."""
    return ocp.PyTreeCheckpointHandler().metadata(path / "state").tree


@contextmanager
def _restoring(path: Path) -> Iterator[None]:
    """The seal says that the bytes are right: memory or storage is at fault, or the caller."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise RunStopped(f"{path}: cannot be restored: {_line(error)}") from error


def _none_sound(folder: Path, skipped: list[Path]) -> str:
    steps = ", ".join(path.name for path in skipped) or "only damaged ones"
    return f"{folder}: found damaged checkpoints ({steps}); expected a sound one"


def _line(error: Exception) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    for reason in ("No space left on device", "Disk quota exceeded", "Permission denied"):
        if reason in text:  # Orbax buries it in a paragraph of paths
            return reason
    return text[:200] or type(error).__name__


def _not_orbax_error(record: logging.LogRecord) -> bool:
    """Orbax logs a traceback per thread for an error that it raises as well."""
    return record.levelno < logging.ERROR or "orbax" not in Path(record.pathname).parts
