"""Checkpoints: written in the background, sealed against bit rot, restored onto any mesh.

A step is a folder that Orbax commits by a rename; on an object store, by a last file in it. Orbax
itself notices no flipped bit, so every step carries a seal: the size and a checksum of its files,
written just before the commit, so that a committed step is a sealed one.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gadjax.errors import InputError, RunStopped
from gadjax.storage import absolute, faults, is_remote, listing, move
from gadjax.training.seal import COMMIT, SEAL, find_fault, write_seal
from gadjax.training.sharding import path_name
from gadjax.training.state import TrainState
from gadjax.types import Params

ASIDE = "damaged"  # folder for what a restore skipped
PARTS = {"ema": ("ema",), "student": ("params", "student"), "critic": ("params", "critic")}

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Every process calls every method, in the same order."""

    def __init__(self, folder: Path, *, keep: int = 3, keep_every: int | None = None):
        """keep: how many of the newest steps stay; keep_every: steps that stay for good."""
        logging.getLogger("absl").addFilter(_not_orbax_error)
        self.folder, self.faults = absolute(folder), faults(folder)
        self.saving: int | None = None
        policies = ocp.checkpoint_managers
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # a damaged step must not stop the others' listing
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step: int, state: TrainState, meta: dict) -> None:
        """Write in the background, after the save before has ended. A step already there stays.

        Returns once `state` may be donated. meta: anything JSON holds.
        Raises: RunStopped where this save, or the one before, cannot be written.
        """
        self.wait()
        if step in self.manager.all_steps():
            return
        self.saving = step
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_nested(state)), meta=ocp.args.JsonSave(meta)
        )
        try:
            saved = self.manager.save(step, args=args)
        except self.faults as error:
            raise self._failed(error) from error
        if not saved:  # Orbax's way of refusing a step older than the newest
            newest = self.manager.latest_step()
            raise RunStopped(f"{self.folder}: found step {newest}; expected none after {step}")

    def restore(self, abstract: TrainState) -> tuple[int, TrainState, dict] | None:
        """The newest valid step as (step, state, meta), or None where there are no checkpoints.

        abstract: ShapeDtypeStruct leaves, each with its sharding on the mesh to restore onto. A
        step that contradicts its seal is logged by path and file, skipped, and moved to
        `damaged/` once another one was restored, since training will write that step again. A
        step without a seal is valid if Orbax restores it: its commit was atomic.
        Raises: InputError naming a leaf that the checkpoint has not, or has in another shape or
        dtype (Orbax would cast); RunStopped where there are checkpoints but no valid one.
        """
        self.wait()
        skipped: list[Path] = []
        first = jax.process_index() == 0  # which reads for the seals; the others follow it
        candidates = _candidates(self.folder, skipped) if first else iter(())
        while (step := _from_first(next(candidates, -1))) >= 0:
            path = self.folder / str(step)
            try:
                state, meta = self._read(path, step, abstract)
            except InputError:
                raise
            except Exception as error:
                _skip_unsealed(path, error, skipped)
                continue
            self._set_aside(skipped)
            return step, state, meta
        if _from_first(len(skipped)):
            raise RunStopped(_none_valid(self.folder, skipped))
        return None

    def wait(self) -> None:
        """Until the last save is committed. Raises: RunStopped where it could not be written."""
        try:
            self.manager.wait_until_finished()
        except self.faults as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """`wait`, and give up the threads."""
        try:
            self.manager.close()
        except self.faults as error:
            raise self._failed(error) from error

    def _seal(self) -> None:
        """Orbax calls it in the background on process 0, after the files, before the commit."""
        temporary = sorted(self.folder.glob(f"{self.saving}.orbax-checkpoint-tmp*"))
        for path in temporary or [self.folder / str(self.saving)]:
            write_seal(path)

    def _read(self, path: Path, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        check_leaves(path, _names(_metadata(path)), _names(abstract))
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(_nested(abstract)), meta=ocp.args.JsonRestore()
        )
        found = self.manager.restore(step, args=args)
        names = _names(found["state"])
        state = jax.tree_util.tree_map_with_path(lambda p, _: names[path_name(p)], abstract)
        return state, found["meta"]

    def _set_aside(self, skipped: list[Path]) -> None:
        if not _from_first(len(skipped)):
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

    def _failed(self, error: Exception) -> RunStopped:
        return RunStopped(f"{self.folder}/{self.saving}: cannot be written: {_line(error)}")


def read_params(
    folder: Path, part: str = "ema", step: int | None = None
) -> tuple[int, Params, dict]:
    """One network out of a run's checkpoints: (step, nested dict of numpy arrays, meta).

    Needs no mesh and no model, and reads no other arrays (though every file, for the seal).
    part: ema, student or critic. step: by default the newest valid one.
    Raises: InputError where there is no such checkpoint or part, or where `step` is damaged;
    RunStopped where there are checkpoints but no valid one.
    """
    folder = absolute(folder)
    if part not in PARTS:
        raise InputError(f"part: found {part!r}; expected one of {', '.join(PARTS)}")
    steps = _steps(folder)
    if not steps or step is not None and step not in steps:
        found = ", ".join(map(str, steps)) or "no checkpoint"
        raise InputError(f"{folder}: found {found}; expected {'one' if step is None else step}")
    if step is not None and (fault := find_fault(folder / str(step))):
        raise InputError(f"{folder / str(step)}: found a damaged checkpoint ({fault})")
    skipped: list[Path] = []
    for candidate in [step] if step is not None else _candidates(folder, skipped):
        path = folder / str(candidate)
        try:
            return candidate, _read_part(path, part), _read_meta(path)
        except InputError:
            raise
        except Exception as error:
            _skip_unsealed(path, error, skipped)
    raise RunStopped(_none_valid(folder, skipped))


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


def check_leaves(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare name -> (something with shape and dtype). Raises: InputError naming one leaf."""
    for name in [*wanted, *found]:
        a, b = _kind(found.get(name)), _kind(wanted.get(name))
        if a != b:
            raise InputError(f"{path}: {name}: found {a}; expected {b}")


def _kind(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def _names(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _nested(tree: Any) -> dict[str, Any]:
    """The same leaves in plain dicts with string keys, which is what Orbax's metadata can hold."""
    nested: dict[str, Any] = {}
    for name, leaf in _names(tree).items():
        *folders, last = name.split("/")
        place = nested
        for key in folders:
            place = place.setdefault(key, {})
        place[last] = leaf
    return nested


def _metadata(path: Path) -> dict[str, Any]:
    """Shapes and dtypes of a step, nested."""
    return ocp.PyTreeCheckpointHandler().metadata(path / "state").tree


def _steps(folder: Path) -> list[int]:
    """Committed steps, newest first."""
    if is_remote(folder):
        names = [name.removesuffix(f"/{COMMIT}") for name in listing(folder) if COMMIT in name]
    else:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _candidates(folder: Path, skipped: list[Path]) -> Iterator[int]:
    """Steps that do not contradict their seal, newest first; the others go into `skipped`."""
    for step in _steps(folder):
        path = folder / str(step)
        fault = find_fault(path)
        if fault is None:
            yield step
        else:
            _skip(path, fault, skipped)


def _skip(path: Path, fault: str, skipped: list[Path]) -> None:
    log.warning("%s: damaged checkpoint skipped: %s", path, fault)
    skipped.append(path)


def _skip_unsealed(path: Path, error: Exception, skipped: list[Path]) -> None:
    """A failed restore is damage where there is no seal to say otherwise.

    Raises: RunStopped where there is one: the bytes are right, so memory or storage is at fault.
    """
    if (path / SEAL).exists():
        raise RunStopped(f"{path}: cannot be restored: {_line(error)}") from error
    _skip(path, _line(error), skipped)


def _none_valid(folder: Path, skipped: list[Path]) -> str:
    steps = ", ".join(path.name for path in skipped) or "only damaged ones"
    return f"{folder}: found damaged checkpoints ({steps}); expected a valid one"


def _from_first(value: int) -> int:
    """Process 0's value, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    for reason in ("No space left on device", "Disk quota exceeded", "Permission denied"):
        if reason in text:  # Orbax buries it in a paragraph of paths
            return reason
    return text[:200] or type(error).__name__


def _not_orbax_error(record: logging.LogRecord) -> bool:
    """Orbax logs a traceback per thread for an error that it raises as well."""
    return record.levelno < logging.ERROR or "orbax" not in Path(record.pathname).parts
