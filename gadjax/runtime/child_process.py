"""One process of a run as its supervisor sees it from outside."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# What is written before an abort, the most telling first; all but one by JAX.
PEER_LOST = (
    r"(?<=gadjax: a peer was lost: )[^\n]*",
    r"The following tasks are unhealthy[^\n]*\n[^\n]*",
    r"Failed to send RPC to coordination service[^\n]*",
    r"JAX distributed service detected fatal errors",
)
NAMES = {number.value: number.name for number in signal.Signals}
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Child:
    """One process, its log from `start` on, and what its heartbeats told."""

    def __init__(self, number: int, command: list[str], environment: dict, log: Path | None):
        self.number, self.log, self.code = number, log, None
        self.heartbeat = Path(environment["GADJAX_HEARTBEAT"])
        self.step: int | None = None
        self.seen = time.monotonic()  # its clock is this one, whatever happens to the other
        self.last, self.beats = b"", 0
        out = open(log, "ab") if log else None
        self.start = log.stat().st_size if log else 0
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out else None,
            start_new_session=True,  # a terminal's Ctrl-C reaches it through the supervisor only
            preexec_fn=_end_with(os.getpid()),
        )
        if out:
            out.close()

    def __str__(self) -> str:
        return f"process {self.number} (pid {self.process.pid})"

    def look(self) -> bool:
        """Read its newest heartbeat; whether it ended since the last look."""
        before, self.code = self.code, self.process.poll()
        try:
            text = self.heartbeat.read_bytes()
            if text != self.last:
                self.step, self.last, self.seen = json.loads(text)["step"], text, time.monotonic()
                self.beats += 1
        except (OSError, ValueError, LookupError, TypeError):
            pass  # none yet
        return before is None and self.code is not None

    def hangs(self, usual: float, more: float) -> bool:
        """Whether it was silent for longer than usual; its first step, which compiles, has more."""
        return self.silent() > usual + more * (self.beats < 2)

    def silent(self) -> float:
        """Seconds since its last heartbeat, or since it began."""
        return time.monotonic() - self.seen

    def progress(self) -> tuple[int, float]:
        """Smallest for the process that is furthest behind."""
        return -1 if self.step is None else self.step, self.seen

    def place(self) -> str:
        if self.step is None:
            return f"before its first step, {self.silent():.1f} s after it was started"
        return f"in step {self.step}, {self.silent():.1f} s after its last heartbeat"

    def ending(self) -> str:
        how = f"ended with code {self.code}"
        if self.code < 0:
            how = f"was killed by {NAMES.get(-self.code, f'signal {-self.code}')}"
        return f"{self} {how} at {time.strftime('%H:%M:%S')}, {self.place()}"

    def said(self) -> str:
        """The end of what it wrote to its log."""
        if self.log is None:
            return ""
        with self.log.open("rb") as file:
            file.seek(max(self.start, file.seek(0, os.SEEK_END) - 100_000))
            return file.read().decode(errors="replace")

    def peer_lost(self) -> str | None:
        """What JAX wrote where it aborted for the loss of another process."""
        found = (re.search(text, self.said()) for text in PEER_LOST)
        first = next((match for match in found if match), None)
        return " ".join(first.group().split())[:200] if first else None

    def tell(self, kind: signal.Signals) -> None:
        self.process.send_signal(kind)

    def kill(self) -> None:
        """With whatever it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _end_with(parent: int) -> Callable[[], None] | None:
    """What a process does before its command, for SIGTERM to reach it when `parent` is killed."""
    if _libc is None:
        return None

    def prepare() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare
