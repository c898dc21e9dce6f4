"""A text file that grows, on a disk that may be full or a store that cannot add to an object."""

import logging
from contextlib import suppress
from pathlib import Path

from gadjax.io.storage import is_remote, store_errors, write_whole

log = logging.getLogger(__name__)


class Growing:
    """A text file that lines are added to, after those it has.

    In a folder every line is there at once; what a full disk does not take is held, and written
    before the next line. An object cannot be added to: there all lines are held, and `upload`
    writes them.
    """

    def __init__(self, path: Path):
        """Raises: OSError, here and in `add` and `upload`."""
        self.path, self.late, self.held, self.file = path, False, bytearray(), None
        if not is_remote(path):
            self.file = path.open("ab", buffering=0)  # a killed run leaves whole lines
            return
        with store_errors(path), suppress(FileNotFoundError):
            self.held += path.read_bytes()

    def add(self, line: str) -> None:
        self.held += f"{line}\n".encode()
        self.late = True
        while self.file and self.held:
            del self.held[: self.file.write(self.held)]

    def upload(self) -> None:
        """Of all lines, to a store."""
        if self.late:
            write_whole(self.path, bytes(self.held))
            self.late = False

    def close(self) -> None:
        if self.file is None:
            return
        if self.held:
            log.warning("%s: %d lines could not be written", self.path, self.held.count(b"\n"))
        self.file.close()
