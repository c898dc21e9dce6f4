"""Where the wall time of a run goes: the share that is spent in steps is its goodput."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gadjax.errors import InputError
from gadjax.io.storage import write_atomic
from gadjax.io.untrusted import read_json

GOODPUT = "goodput.json"
# In the order in which people read them.
KINDS = ("step", "data", "checkpoint", "preview", "compile", "lost")


class GoodputClock:
    """Seconds of the host by kind, over all starts of a run.

    compile: a start up to its first step (loading, restoring, compiling). data, checkpoint,
    preview: what `with clock(kind):` holds. step: all the rest. Nothing waits for a device on the
    clock's account: metrics are read one step late, and the wait for the device then counts as
    step, as does writing log lines. lost: steps that a start does again because the one before
    died after its last checkpoint, at what a step took on average; they count as step no more.
    What a start that was killed did after its last log line is not known, and the time between
    two starts is nobody's.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self.now, self.since = now, now()
        self.kind = "compile"
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.starts = 1
        self.step = 0  # the newest
        self.steps = 0  # how many the seconds of "step" were spent on
        self.file: Path | None = None

    def resume(self, workdir: Path, start: int) -> None:
        """Go on from the record of the starts before; this one begins after step `start`."""
        self.file, self.step = workdir / GOODPUT, start
        try:
            before = read_json(self.file)
            seconds = {kind: before["seconds"][kind] for kind in KINDS}
            starts, newest, steps = (before[name] for name in ("starts", "step", "steps"))
            whole = all(type(n) is int and 0 <= n < 2**63 for n in (starts, newest, steps))
            whole &= all(type(x) in (int, float) and 0 <= x < 1e15 for x in seconds.values())
        except (InputError, LookupError, TypeError):
            whole = False
        if not whole:
            return  # the first start, or nothing that can be read: count from here
        again = min(max(newest - start, 0), steps)
        lost = again * seconds["step"] / max(steps, 1)
        self.starts, self.steps = starts + 1, steps - again
        for kind, more in (seconds | {"step": seconds["step"] - lost}).items():
            self.seconds[kind] += more
        self.seconds["lost"] += lost

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """What happens inside counts as this kind; before the first step, as compile."""
        if self.kind == "compile":
            yield
            return
        before = self._turn(kind)
        try:
            yield
        finally:
            self._turn(before)

    def stepped(self, step: int) -> None:
        """A step was started; its program is compiled."""
        if self.kind == "compile":
            self._turn("step")
        self.step = step
        self.steps += 1

    def share(self) -> float:
        """Of the time so far, how much was spent in steps."""
        self._turn(self.kind)
        return shares(self.seconds)["step"]

    def write(self) -> None:
        """Raises: OSError."""
        if self.file is None:
            return
        self._turn(self.kind)
        seconds = {kind: round(value, 3) for kind, value in self.seconds.items()}
        record = {"step": self.step, "steps": self.steps, "starts": self.starts}
        write_atomic(self.file, json.dumps(record | {"seconds": seconds}) + "\n")

    def _turn(self, kind: str) -> str:
        now, before = self.now(), self.kind
        self.seconds[before] += now - self.since
        self.since, self.kind = now, kind
        return before


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Of all of the time, by kind."""
    total = sum(seconds.values())
    return {kind: value / total if total else 0.0 for kind, value in seconds.items()}
