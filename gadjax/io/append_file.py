"""A text file that grows, on a disk that may be full or a store that cannot add to an object."""

import logging
from contextlib import suppress
from pathlib import Path

from gadjax.io.storage import is_remote, store_errors, write_atomic

log = logging.getLogger(__name__)


class AppendFile:
    """A text file that lines are added to, after those it has.

    In a folder every line is there at once; what a full disk does not take is held, and written
    before the next line. An object cannot be added to: there all lines are held, and `upload`
    writes them.
    """

    def __init__(self, path: Path):
        """Raises: OSError, here and in `add` and `upload`."""
        self.path, self.dirty, self.buffer, self.file = path, False, bytearray(), None
        if not is_remote(path):
            self.file = path.open("ab", buffering=0)  # a killed run leaves whole lines
            return
        with store_errors(path), suppress(FileNotFoundError):
            self.buffer += path.read_bytes()

    def add(self, line: str) -> None:
        self.buffer += f"{line}\n".encode()
        self.dirty = True
        while self.file and self.buffer:
            del self.buffer[: self.file.write(self.buffer)]

    def upload(self) -> None:
        """Of all lines, to a store."""
        if self.dirty:
            write_atomic(self.path, bytes(self.buffer))
            self.dirty = False

    def close(self) -> None:
        if self.file is None:
            return
        if self.buffer:
            log.warning("%s: %d lines could not be written", self.path, self.buffer.count(b"\n"))
        self.file.close()
