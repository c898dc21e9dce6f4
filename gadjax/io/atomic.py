"""Atomic writes of folders: the complete folder or none, whenever the writer is killed.

<dst>.partial-<id>   sibling folder that a writer fills and locks; left over only where the writer
                     was killed, until the next writer of `dst` removes it
<dst>.replaced-<id>  the old folder between two renames, where the file system cannot exchange two
                     folders atomically (Linux's own can); restored if `dst` is missing
"""

import ctypes
import errno
import fcntl
import glob
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gadjax.errors import InputError

PARTIAL, REPLACED = "partial", "replaced"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux constants

log = logging.getLogger(__name__)
_in_progress: set[Path] = set()  # partial folders of this process


def check_target(dst: Path, *, overwrite: bool = False, marker: str | None = None) -> None:
    """Refuse a target that would be overwritten unasked, before any work is done.

    Args:
      dst: the target folder.
      overwrite: allow a non-empty folder.
      marker: file that a folder must contain to be overwritten, so that only output of an earlier
        such command is ever removed.

    Raises: InputError.
    """
    restore_replaced(dst)
    if dst.is_file():
        raise InputError(f"{dst}: found a file; expected a new or empty folder")
    if not dst.is_dir() or not any(dst.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{dst}: found a folder with files in it; expected a new or empty one")
    if marker is not None and not (dst / marker).is_file():
        raise InputError(
            f"{dst}: found a folder without {marker}; expected one of the same kind to overwrite"
        )


def check_no_overlap(out: Path, *sources: Path) -> None:
    """Check that `out` contains none of the sources, which writing it would replace.

    Raises: InputError.
    """
    target = out.resolve()
    for source in (source.resolve() for source in sources):
        if target in (source, *source.parents):
            raise InputError(f"{out}: found {source} in it; expected a folder elsewhere")


@contextmanager
def atomic_folder(
    dst: Path, *, overwrite: bool = False, marker: str | None = None
) -> Iterator[Path]:
    """Write a folder atomically: fill the yielded sibling, which becomes `dst` on exit.

    On an error the sibling is removed. A process killed inside leaves `dst` as it was, or complete.
    Nested in a folder that is itself being written so, `dst` is yielded.

    Args:
      dst, overwrite, marker: as for `check_target`.

    Raises: InputError as `check_target`, and where the sibling cannot be created; OSError.
    """
    check_target(Path(dst), overwrite=overwrite, marker=marker)
    dst = Path(dst).resolve()
    if dst in _in_progress:
        yield dst
        return
    with partial_folder(dst) as partial:
        _in_progress.add(partial)
        try:
            yield partial
        finally:
            _in_progress.remove(partial)
        _sync(partial)
        check_target(dst, overwrite=overwrite, marker=marker)
        _swap(partial, dst)


@contextmanager
def partial_folder(dst: Path) -> Iterator[Path]:
    """Temporary sibling folder of `dst`, removed on exit; removes those of killed writers first.

    Raises: InputError where it cannot be created.
    """
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        for stale in _siblings(dst, PARTIAL) + (_siblings(dst, REPLACED) if dst.exists() else []):
            with _if_abandoned(stale) as abandoned:
                if abandoned:
                    shutil.rmtree(stale, ignore_errors=True)
        partial, lock = _create(dst)
    except OSError as error:
        raise InputError(
            f"{dst}: found {error.strerror} for {error.filename}; expected a folder to write in"
        ) from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def restore_replaced(dst: Path) -> None:
    """Restore `dst` where a process was killed between moving it aside and replacing it.

    Raises: InputError where it cannot be renamed.
    """
    if dst.exists():
        return
    dst = dst.resolve()
    for aside in _siblings(dst, REPLACED):
        with _if_abandoned(aside) as abandoned:
            if not abandoned:
                continue
            try:
                os.rename(aside, dst)
            except OSError as error:
                raise InputError(
                    f"{aside}: found {dst.name} as a killed command left it, which cannot be "
                    f"renamed ({error.strerror}); expected it at {dst}"
                ) from error
            log.warning("%s: restored from %s, where a killed command left it", dst, aside.name)
            return


def _siblings(dst: Path, kind: str) -> list[Path]:
    return sorted(dst.parent.glob(f"{glob.escape(dst.name)}.{kind}-*"))


def _sibling(dst: Path, kind: str) -> Path:
    return dst.with_name(f"{dst.name}.{kind}-{uuid.uuid4().hex[:8]}")


@contextmanager
def _if_abandoned(folder: Path) -> Iterator[bool]:
    """Yield whether no process writes to a folder; locked meanwhile."""
    lock = None
    try:
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        abandoned = True
    except OSError:  # missing, locked by its writer, or on a file system without locks
        abandoned = False
    try:
        yield abandoned
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int:
    """Lock a folder while this process lives; without effect on file systems without locks.

    Returns: the lock's file descriptor.
    Raises: OSError.
    """
    lock = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _create(dst: Path) -> tuple[Path, int]:
    """Create a partial folder and lock it. Raises: OSError."""
    while True:
        partial = _sibling(dst, PARTIAL)
        partial.mkdir()
        with suppress(FileNotFoundError):
            lock = _lock(partial)
            if partial.exists():
                return partial, lock
            os.close(lock)  # another writer took it for abandoned before it was locked


def _swap(new: Path, dst: Path) -> None:
    """Rename `new` to `dst`; the old `dst` is then at `new`, or removed. Raises: OSError."""
    if not (dst.is_dir() and any(dst.iterdir())):
        os.replace(new, dst)
    elif not _exchange(new, dst):
        aside, lock = _sibling(dst, REPLACED), _lock(dst)
        try:
            os.rename(dst, aside)
            try:
                os.rename(new, dst)
            except OSError:
                os.rename(aside, dst)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            os.close(lock)
    _fsync(dst.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders atomically; False where the system or file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    paths = os.fsencode(a), os.fsencode(b)
    return rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0


def _sync(folder: Path) -> None:
    """Flush a folder to the disk: after a power failure no name may lack its content."""
    for root, _, files in os.walk(folder):
        for name in files:
            _fsync(Path(root, name))
        _fsync(Path(root))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
