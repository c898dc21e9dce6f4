"""Where a workdir lies: a folder, or a prefix of an object store (gs://BUCKET/...).

A store knows neither rename nor append, and its clients raise errors of many kinds. What else
differs lies with whoever writes: `gadjax.io.append_file`, `gadjax.io.manifest` and
`gadjax.runtime.workdir_lock`.
"""

import errno
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from gadjax.errors import InputError, RunStopped

GS = "gs://"

log = logging.getLogger(__name__)
_failing: set[str] = set()  # paths that were said to fail, until they can be written again


def as_path(text: str | PurePath, flag: str = "--workdir") -> Any:
    """A pathlib.Path, or for gs:// an etils.epath.Path, which is used like one.

    Raises: InputError for another store, and where the package for this one is missing.
    """
    text = os.fspath(text)
    if not is_remote(text):
        return Path(text)
    if not text.startswith(GS) or not text.removeprefix(GS).strip("/"):
        raise InputError(
            f"{flag}: found {text}; expected a folder or gs://BUCKET/..., the one kind of object "
            "store that Orbax writes to (a bucket of another can be mounted as a folder)"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(
            f"{flag}: found {text}, which needs gcsfs; expected pip install 'gadjax[gcs]'"
        )
    os.environ.setdefault("EPATH_USE_TF", "false")  # the same client, with tensorflow or without
    import fsspec
    from etils import epath

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises as well
    # Orbax's arrays are not written by this client, whose cached listings would not know of them.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(text)


def is_remote(path: str | PurePath) -> bool:
    return "://" in str(path)


def absolute(path: Any) -> Any:
    return path if is_remote(path) else Path(path).absolute()


def check_access(path: Any, write: bool = False) -> None:
    """One request to the store. write: for its bucket itself, as Orbax makes when it deletes.

    Raises: InputError where the store refuses, or has no such bucket.
    """
    if not is_remote(path):
        return
    bucket = str(path).removeprefix(GS).partition("/")[0]
    try:
        with store_errors(path):
            if write:
                client().call("GET", "b/{}", bucket)
            else:
                client().call("GET", "b/{}/o", bucket, maxResults=1)
    except OSError as error:
        raise InputError(
            f"{path}: found {error.strerror}; expected a bucket that can be "
            + ("written, and storage.buckets.get on it" if write else "read")
        ) from error


def client() -> Any:
    """fsspec's, as etils.epath uses it."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)


def put_object(path: Any, data: bytes, new: bool = False) -> None:
    """An object, which appears when all of it is there. new: only where there is none.

    Raises: FileExistsError; OSError.
    """
    with store_errors(path):
        client().pipe_file(str(path), data, mode="create" if new else "overwrite")


def write_atomic(path: Any, data: str | bytes) -> None:
    """Write a file that is the old one or the new one at any instant. Raises: OSError."""
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        return put_object(path, data)
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_bytes(data)
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink()  # half a file, where there may be no room for it
        raise


def move(old: Any, new: Any) -> None:
    """A folder; in a store, object by object."""
    if is_remote(old):
        client().mv(str(old), str(new), recursive=True)
    else:
        old.rename(new)


def list_objects(folder: Any) -> dict[str, dict[str, Any]]:
    """{size, crc32c} of every object below a folder of a store, by its path in there.

    Raises: RunStopped where the store does not answer: that is not to be taken for an empty folder.
    """
    root = str(folder).removeprefix(GS).rstrip("/") + "/"
    try:
        with store_errors(folder):
            found = client().find(root, detail=True)
    except OSError as error:
        raise RunStopped(f"{folder}: cannot be read: {error.strerror}") from error
    return {
        name.removeprefix(root): {"size": entry["size"], "crc32c": entry.get("crc32c")}
        for name, entry in found.items()
    }


def write_errors(path: Any) -> tuple[type[Exception], ...]:
    """What Orbax lets through where it cannot write."""
    return (Exception,) if is_remote(path) else (OSError, ValueError, RuntimeError)


@contextmanager
def store_errors(path: Any) -> Iterator[None]:
    """Whatever a store's client raises becomes an OSError of one line; a folder's errors stay."""
    try:
        yield
    except Exception as error:
        if not is_remote(path) or isinstance(error, FileExistsError):
            raise
        text = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, f"nothing at {text}") from error
        raise OSError(errno.EIO, text) from error


@contextmanager
def warn_on_write_error(path: Any, tolerate: bool = False) -> Iterator[None]:
    """For a file that is written again soon: a store that fails once is no reason to stop a run,
    nor is a folder where the run is to bear that (patient). It is said once per failure.

    Raises: RunStopped where a folder cannot be written and that is not to be borne.
    """
    try:
        yield
        _failing.discard(str(path))
    except OSError as error:
        text = error.strerror or error
        if not (tolerate or is_remote(path)):
            raise RunStopped(f"{path}: cannot be written: {text}") from error
        if str(path) not in _failing:
            log.warning("%s: cannot be written now: %s", path, text)
        _failing.add(str(path))
