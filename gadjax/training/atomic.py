"""Small files that are read while they are written."""

import io
from pathlib import Path

from gadjax.storage import is_remote, put, store_errors


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file that is the old one or the new one at any instant. Raises: OSError."""
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        return put(path, data)
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(data)
    new.replace(path)


class Growing:
    """A text file that lines are added to, after those it has.

    In a folder every line is there at once. An object cannot be added to: there the lines are held
    in memory, and `upload` writes all of them.
    """

    def __init__(self, path: Path):
        """Raises: OSError, here and in `add` and `upload`."""
        self.path, self.late = path, False
        if not is_remote(path):
            self.file = path.open("a", encoding="utf-8")
            return
        self.file = io.StringIO()
        with store_errors(path):
            try:
                self.file.write(path.read_bytes().decode())
            except FileNotFoundError:
                pass

    def add(self, line: str) -> None:
        self.file.write(line + "\n")
        self.file.flush()  # a killed run leaves whole lines
        self.late = True

    def upload(self) -> None:
        """Does nothing in a folder."""
        if self.late and isinstance(self.file, io.StringIO):
            write_whole(self.path, self.file.getvalue())
            self.late = False

    def close(self) -> None:
        self.file.close()
