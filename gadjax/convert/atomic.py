"""A folder that appears whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gadjax.errors import InputError


def check_target(dst: Path, *, overwrite: bool = False, marker: str | None = None) -> None:
    """Refuse a target that would be overwritten unasked, before any work is done for it.

    marker: a file that a folder must hold to be overwritten, so that only what such a command
      wrote before is ever removed.
    Raises: InputError.
    """
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


def check_apart(out: Path, *sources: Path) -> None:
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

    An existing folder is moved aside, replaced and only then removed. A process killed inside
    leaves `<dst>.partial-<id>` behind, and `dst` as it was.
    Raises: InputError as `check_target`, and when the sibling cannot be made.
    """
    check_target(Path(dst), overwrite=overwrite, marker=marker)
    dst = Path(dst).resolve()
    name = uuid.uuid4().hex[:8]
    partial = dst.with_name(f"{dst.name}.partial-{name}")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise InputError(
            f"{dst}: found {error.strerror} for {error.filename}; expected a folder to write in"
        ) from None
    try:
        yield partial
        if dst.is_dir() and any(dst.iterdir()):
            check_target(dst, overwrite=overwrite, marker=marker)
            _swap(partial, dst, dst.with_name(f"{dst.name}.replaced-{name}"))
        else:
            os.replace(partial, dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _swap(new: Path, dst: Path, aside: Path) -> None:
    os.rename(dst, aside)
    try:
        os.rename(new, dst)
    except OSError:
        os.rename(aside, dst)
        raise
    shutil.rmtree(aside, ignore_errors=True)
