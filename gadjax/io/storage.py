"""Storage of a workdir: a local folder, or a prefix of an object store (gs://BUCKET/...).

A store has neither rename nor append, and its clients raise errors of many kinds. Other differences
are handled by the writers: `gadjax.io.append_file`, `gadjax.io.manifest` and
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
_unwritable: set[str] = set()  # paths already warned of, until they can be written again


def as_path(text: str | PurePath, flag: str = "--workdir") -> Any:
    """Parse a path: a pathlib.Path, or for gs:// an etils.epath.Path with the same interface.

    Raises: InputError for another store, and where the package for this one is missing.
    """
    text = os.fspath(text)
    if not is_remote(text):
        return Path(text)
    if not text.startswith(GS) or not text.removeprefix(GS).strip("/"):
        raise InputError(
            f"{flag}: found {text}; expected a folder or gs://BUCKET/..., the only object store "
            "that Orbax writes to (a bucket of another can be mounted as a folder)"
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
    """Check access to an object store with one request; a local path is not checked.

    write: request the bucket's metadata, as Orbax does when it deletes.

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
    """The fsspec file system of the store, configured as etils.epath configures it."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)


def put_object(path: Any, data: bytes, new: bool = False) -> None:
    """Upload an object in one atomic write.

    Args:
      path: of the object.
      data: its content.
      new: fail where the object exists.

    Raises: FileExistsError; OSError.
    """
    with store_errors(path):
        client().pipe_file(str(path), data, mode="create" if new else "overwrite")


def write_atomic(path: Any, data: str | bytes) -> None:
    """Atomic write: at any instant the file is the old one or the new one. Raises: OSError."""
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        return put_object(path, data)
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_bytes(data)
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink()  # a partial file, where the disk may be full
        raise


def move(old: Any, new: Any) -> None:
    """Move a folder; in a store object by object, not atomically."""
    if is_remote(old):
        client().mv(str(old), str(new), recursive=True)
    else:
        old.rename(new)


def list_objects(folder: Any) -> dict[str, dict[str, Any]]:
    """List the objects below a folder of a store: relative path -> {size, crc32c}.

    Raises: RunStopped where the store does not answer, which must not be taken for an empty folder.
    """
    root = str(folder).removeprefix(GS).rstrip("/") + "/"
    try:
        with store_errors(folder):
            entries = client().find(root, detail=True)
    except OSError as error:
        raise RunStopped(f"{folder}: cannot be read: {error.strerror}") from error
    return {
        name.removeprefix(root): {"size": entry["size"], "crc32c": entry.get("crc32c")}
        for name, entry in entries.items()
    }


def write_errors(path: Any) -> tuple[type[Exception], ...]:
    """Exception types that Orbax raises where it cannot write."""
    return (Exception,) if is_remote(path) else (OSError, ValueError, RuntimeError)


@contextmanager
def store_errors(path: Any) -> Iterator[None]:
    """Convert any exception of a store's client to a one-line OSError; local errors pass."""
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
    """Warn where a periodically rewritten file cannot be written, once per outage.

    A store that fails once never stops a run.

    tolerate: nor does a local folder.

    Raises: RunStopped where a local folder cannot be written and `tolerate` is false.
    """
    try:
        yield
        _unwritable.discard(str(path))
    except OSError as error:
        text = error.strerror or error
        if not (tolerate or is_remote(path)):
            raise RunStopped(f"{path}: cannot be written: {text}") from error
        if str(path) not in _unwritable:
            log.warning("%s: cannot be written now: %s", path, text)
        _unwritable.add(str(path))
