"""Append-only text files, on a disk that may be full or in an object store without append."""

import logging
from contextlib import suppress
from pathlib import Path

from gadjax.io.storage import is_remote, store_errors, write_atomic

log = logging.getLogger(__name__)


class AppendFile:
    """Append-only text file.

    In a local folder every line is written at once; what a full disk does not take is buffered and
    written before the next line. A store cannot append to an object: there all lines are buffered,
    and `upload` writes them.
    """

    def __init__(self, path: Path):
        """Open for appending. Raises: OSError, here and in `add` and `upload`."""
        self.path, self.dirty, self.buffer, self.file = path, False, bytearray(), None
        if not is_remote(path):
            self.file = path.open("ab", buffering=0)  # a killed run leaves complete lines
            return
        with store_errors(path), suppress(FileNotFoundError):
            self.buffer += path.read_bytes()

    def add(self, line: str) -> None:
        self.buffer += f"{line}\n".encode()
        self.dirty = True
        while self.file and self.buffer:
            del self.buffer[: self.file.write(self.buffer)]

    def upload(self) -> None:
        """Write all lines to the store, where any were added since."""
        if self.dirty:
            write_atomic(self.path, bytes(self.buffer))
            self.dirty = False

    def close(self) -> None:
        if self.file is None:
            return
        if self.buffer:
            log.warning("%s: %d lines could not be written", self.path, self.buffer.count(b"\n"))
        self.file.close()
