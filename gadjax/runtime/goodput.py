"""Goodput: the share of a run's wall time that is spent in training steps."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gadjax.errors import InputError
from gadjax.io.storage import write_atomic
from gadjax.io.untrusted import read_json

GOODPUT = "goodput.json"
# In the order of the table of `gadjax status`.
KINDS = ("step", "data", "checkpoint", "preview", "compile", "lost")


class GoodputClock:
    """Goodput accounting: host seconds by kind, summed over all starts of a run.

    - compile: from a start to its first step (loading, restoring, compiling).
    - data, checkpoint, preview: inside `with clock(kind):`.
    - step: all the rest. The clock adds no wait for a device: metrics are read one step late, and
      the wait for the device then counts as step, as does writing log lines.
    - lost: steps repeated because the previous start died after its last checkpoint, at the mean
      seconds of a step; they are taken off step.

    The time of a killed start after its last log line is unknown, and the time between two starts
    is not counted.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self.now, self.since = now, now()
        self.kind = "compile"
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.starts = 1
        self.step = 0  # newest step
        self.steps = 0  # number of steps that the seconds of "step" cover
        self.file: Path | None = None

    def resume(self, workdir: Path, start: int) -> None:
        """Continue goodput.json of the previous starts; this one begins after step `start`."""
        self.file, self.step = workdir / GOODPUT, start
        try:
            record = read_json(self.file)
            seconds = {kind: record["seconds"][kind] for kind in KINDS}
            starts, newest, steps = (record[name] for name in ("starts", "step", "steps"))
            is_valid = all(type(n) is int and 0 <= n < 2**63 for n in (starts, newest, steps))
            is_valid &= all(type(x) in (int, float) and 0 <= x < 1e15 for x in seconds.values())
        except (InputError, LookupError, TypeError):
            is_valid = False
        if not is_valid:
            return  # the first start, or an unreadable record: count from here
        repeated = min(max(newest - start, 0), steps)
        lost = repeated * seconds["step"] / max(steps, 1)
        self.starts, self.steps = starts + 1, steps - repeated
        for kind, more in (seconds | {"step": seconds["step"] - lost}).items():
            self.seconds[kind] += more
        self.seconds["lost"] += lost

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Context whose seconds count as `kind`; before the first step, as compile."""
        if self.kind == "compile":
            yield
            return
        before = self._switch(kind)
        try:
            yield
        finally:
            self._switch(before)

    def record_step(self, step: int) -> None:
        """Count a started step; the first one ends the kind compile."""
        if self.kind == "compile":
            self._switch("step")
        self.step = step
        self.steps += 1

    def share(self) -> float:
        """Return the goodput so far: seconds of steps over all seconds."""
        self._switch(self.kind)
        return shares(self.seconds)["step"]

    def write(self) -> None:
        """Write goodput.json. Raises: OSError."""
        if self.file is None:
            return
        self._switch(self.kind)
        seconds = {kind: round(value, 3) for kind, value in self.seconds.items()}
        record = {"step": self.step, "steps": self.steps, "starts": self.starts}
        write_atomic(self.file, json.dumps(record | {"seconds": seconds}) + "\n")

    def _switch(self, kind: str) -> str:
        now, before = self.now(), self.kind
        self.seconds[before] += now - self.since
        self.since, self.kind = now, kind
        return before


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Share of the total time by kind, in [0, 1]."""
    total = sum(seconds.values())
    return {kind: value / total if total else 0.0 for kind, value in seconds.items()}
