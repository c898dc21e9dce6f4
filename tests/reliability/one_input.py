"""One hostile input read in this process, and what became of it."""

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from figures import ROOT
from flax import nnx
from mutate import Tree, write_tree

import gadjax
from gadjax.errors import InputError, RunStopped

PACKAGE = str(Path(gadjax.__file__).parent)
SECONDS = 10
LONGEST = 2000  # characters of a line


@dataclass(frozen=True)
class Target:
    """A reader of gadjax. make: writes a valid input into an empty folder. read: reads the folder.

    Both are run in another process: functions of a module (or functools.partial of one), no
    lambdas. `read` must not write.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]


@dataclass(frozen=True)
class Outcome:
    """kind: "ok", "refused" or a finding's: "raised", "slow", "lines", "wrote" or "died"."""

    kind: str
    text: str = ""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        return self.kind not in ("ok", "refused")


class Overtime(BaseException):
    """Not an Exception: no reader may take it for a damaged file."""


class Lines:
    """Which lines of gadjax have run."""

    def __init__(self):
        self.executed: set[tuple[str, int]] = set()

    @contextmanager
    def watch(self) -> Iterator[None]:
        before, outline = sys.gettrace(), nnx.eval_shape

        def unwatched(*args, **kwargs):
            # Inside, Python would be several times as slow, and no line depends on an input alone.
            sys.settrace(before)
            try:
                return outline(*args, **kwargs)
            finally:
                sys.settrace(self._call)

        nnx.eval_shape = unwatched
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)
            nnx.eval_shape = outline

    def _call(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        return self._line

    def _line(self, frame, event, arg):
        if event == "line":
            self.executed.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


def read_once(
    target: Target,
    tree: Tree,
    scratch: Path,
    lines: Lines | None = None,
    seconds: float | None = None,
) -> Outcome:
    """Read one input in this process. scratch: an empty folder, which is emptied again.

    seconds: of the processor, after which a signal ends the reading; None in a process that does
    other things, which the signal might hit.
    """
    folder, here, back = scratch / "input", scratch / "here", Path.cwd()
    for path in (folder, here):
        path.mkdir()
    write_tree(tree, folder)
    before, start = photo(scratch), time.process_time()
    os.chdir(here)
    try:
        with _alarm(seconds) if seconds else nullcontext(), (lines or Lines()).watch():
            target.read(folder)
        kind, text = "ok", ""
    except (InputError, RunStopped) as error:
        kind, text = "refused", str(error)
        if len(text.splitlines()) != 1 or len(text) > LONGEST or not text.isprintable():
            kind, text = "lines", f"{len(text)} characters, {text[:300]!r}"
    except Overtime:
        kind, text = "slow", _where()
    except BaseException as error:  # pyo3's panics are no Exceptions
        kind, text = "raised", f"{type(error).__name__}: {str(error)[:200]!r}, {_where()}"
    finally:
        os.chdir(back)
    seconds = time.process_time() - start
    if (after := photo(scratch)) != before:
        changed = [name for name, _ in set(after.items()) ^ set(before.items())]
        kind, text = "wrote", ", ".join(sorted(changed))
    shutil.rmtree(folder), shutil.rmtree(here)
    return Outcome(kind, text, seconds)


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def photo(folder: Path) -> dict[str, tuple]:
    """What lies in a folder: path -> kind, size, time of the last change."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        is_file = path.is_file() and not path.is_symlink()
        size = (stat.st_size, stat.st_mtime_ns) if is_file else ()
        found[str(path.relative_to(folder))] = (stat.st_mode, *size)
    return found


def _where() -> str:
    """The innermost line of gadjax, and the one that raised."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [f for f in frames if f.filename.startswith(PACKAGE)]
    shown = [*ours[-1:], *frames[-1:]]
    return " < ".join(f"{os.path.relpath(f.filename, ROOT)}:{f.lineno}" for f in shown)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def over(*_):
        raise Overtime

    # Of the processor's time: what others run beside is no fault. Who sleeps is killed (fuzz.py).
    signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    try:
        yield
    finally:
        with suppress(Overtime):  # it may expire in here, too
            signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        # Not its default, by which a signal on its way would end the process.
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
