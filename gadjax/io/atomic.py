"""A folder that appears whole or not at all, whenever its writer is killed.

<dst>.partial-<id>   what a writer fills, which holds a lock on it; beside `dst` for good only
                     where the writer was killed, until the next one to write `dst` removes it
<dst>.replaced-<id>  the old folder between two renames, where the file system cannot exchange
                     two folders in one step (Linux's own can); put back if `dst` is missing
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
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux

log = logging.getLogger(__name__)
_filling: set[Path] = set()  # by this process


def check_target(dst: Path, *, overwrite: bool = False, marker: str | None = None) -> None:
    """Refuse a target that would be overwritten unasked, before any work is done for it.

    marker: a file that a folder must hold to be overwritten, so that only what such a command
      wrote before is ever removed.
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
    """Raises: InputError where writing `out` would replace what is read."""
    target = out.resolve()
    for source in (source.resolve() for source in sources):
        if target in (source, *source.parents):
            raise InputError(f"{out}: found {source} in it; expected a folder elsewhere")


@contextmanager
def atomic_folder(
    dst: Path, *, overwrite: bool = False, marker: str | None = None
) -> Iterator[Path]:
    """Fill the yielded sibling folder; it becomes `dst` on leaving, or is removed on an error.

    A process killed inside leaves `dst` as it was, or complete. Inside a folder that is itself
    being filled so, `dst` is yielded.
    Raises: InputError as `check_target`, and when the sibling cannot be made; OSError.
    """
    check_target(Path(dst), overwrite=overwrite, marker=marker)
    dst = Path(dst).resolve()
    if dst in _filling:
        yield dst
        return
    with partial_folder(dst) as partial:
        _filling.add(partial)
        try:
            yield partial
        finally:
            _filling.remove(partial)
        _sync(partial)
        check_target(dst, overwrite=overwrite, marker=marker)
        _swap(partial, dst)


@contextmanager
def partial_folder(dst: Path) -> Iterator[Path]:
    """A folder beside `dst` to work in, removed on leaving, with what killed writers left there.

    Raises: InputError when it cannot be made.
    """
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        for left in _beside(dst, PARTIAL) + (_beside(dst, REPLACED) if dst.exists() else []):
            with _if_left(left) as abandoned:
                if abandoned:
                    shutil.rmtree(left, ignore_errors=True)
        partial, lock = _make(dst)
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
    """Where a killed process had moved `dst` aside to replace it: back to its name.

    Raises: InputError where it cannot be moved.
    """
    if dst.exists():
        return
    dst = dst.resolve()
    for aside in _beside(dst, REPLACED):
        with _if_left(aside) as abandoned:
            if not abandoned:
                continue
            try:
                os.rename(aside, dst)
            except OSError as error:
                raise InputError(
                    f"{aside}: found {dst.name} as a killed command left it, which cannot be "
                    f"renamed ({error.strerror}); expected it at {dst}"
                ) from error
            log.warning("%s: put back from %s, where a killed command left it", dst, aside.name)
            return


def _beside(dst: Path, kind: str) -> list[Path]:
    return sorted(dst.parent.glob(f"{glob.escape(dst.name)}.{kind}-*"))


def _named(dst: Path, kind: str) -> Path:
    return dst.with_name(f"{dst.name}.{kind}-{uuid.uuid4().hex[:8]}")


@contextmanager
def _if_left(folder: Path) -> Iterator[bool]:
    """Whether nobody writes to a folder, which is locked meanwhile."""
    lock = None
    try:
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = True
    except OSError:  # gone, somebody's, or on a file system without locks
        found = False
    try:
        yield found
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int:
    """A lock that ends with this process: a file descriptor. Without effect where there are none.

    Raises: OSError.
    """
    lock = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _make(dst: Path) -> tuple[Path, int]:
    """A new folder and its lock. Raises: OSError."""
    while True:
        partial = _named(dst, PARTIAL)
        partial.mkdir()
        with suppress(FileNotFoundError):
            lock = _lock(partial)
            if partial.exists():
                return partial, lock
            os.close(lock)  # another writer took it for left before it was locked


def _swap(new: Path, dst: Path) -> None:
    """`new` becomes `dst`; what that was is then at `new`, or removed. Raises: OSError."""
    if not (dst.is_dir() and any(dst.iterdir())):
        os.replace(new, dst)
    elif not _exchange(new, dst):
        aside, lock = _named(dst, REPLACED), _lock(dst)
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
    _sync_one(dst.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Two folders change places in one step; False where the system or its disk cannot do it."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    paths = os.fsencode(a), os.fsencode(b)
    return rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0


def _sync(folder: Path) -> None:
    """Onto the disk: a failing power supply must not leave a name without its content."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync_one(Path(root, name))
        _sync_one(Path(root))


def _sync_one(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot for a folder
            raise
    finally:
        os.close(opened)
