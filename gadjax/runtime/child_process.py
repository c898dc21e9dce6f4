"""Child process of a supervisor: exit code, heartbeat, log tail, signals."""

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

# Messages in the log before an abort for a lost peer, most specific first; all but one by JAX.
LOST_PEER_PATTERNS = (
    r"(?<=gadjax: a peer was lost: )[^\n]*",
    r"The following tasks are unhealthy[^\n]*\n[^\n]*",
    r"Failed to send RPC to coordination service[^\n]*",
    r"JAX distributed service detected fatal errors",
)
SIGNAL_NAMES = {number.value: number.name for number in signal.Signals}
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Child:
    """Process of a run, with its log from byte `start` on and the step of its last heartbeat."""

    def __init__(self, number: int, command: list[str], environment: dict, log: Path | None):
        """Start the process, in a session of its own.

        Args:
            number: rank, for messages.
            command: argument list.
            environment: variables added to this process's; GADJAX_HEARTBEAT among them.
            log: file that its output is appended to; None for this process's stdout and stderr.
        """
        self.number, self.log, self.code = number, log, None
        self.heartbeat = Path(environment["GADJAX_HEARTBEAT"])
        self.step: int | None = None
        self.heartbeat_time = time.monotonic()  # of this clock, whatever the child's does
        self.heartbeat_text, self.heartbeats = b"", 0
        out = open(log, "ab") if log else None
        self.start = log.stat().st_size if log else 0
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out else None,
            start_new_session=True,  # a terminal's Ctrl-C reaches it through the supervisor only
            preexec_fn=_terminate_with_parent(os.getpid()),
        )
        if out:
            out.close()

    def __str__(self) -> str:
        return f"process {self.number} (pid {self.process.pid})"

    def poll(self) -> bool:
        """Read the newest heartbeat; return True if the process ended since the last poll."""
        before, self.code = self.code, self.process.poll()
        try:
            text = self.heartbeat.read_bytes()
            if text != self.heartbeat_text:
                self.step, self.heartbeat_text, self.heartbeat_time = (
                    json.loads(text)["step"],
                    text,
                    time.monotonic(),
                )
                self.heartbeats += 1
        except (OSError, ValueError, LookupError, TypeError):
            pass  # no heartbeat yet
        return before is None and self.code is not None

    def is_hung(self, limit: float, startup: float) -> bool:
        """Return True after `limit` s without a heartbeat, or `startup` s more up to the second."""
        return self.heartbeat_age() > limit + startup * (self.heartbeats < 2)

    def heartbeat_age(self) -> float:
        """Seconds since the last heartbeat, or since the start."""
        return time.monotonic() - self.heartbeat_time

    def progress(self) -> tuple[int, float]:
        """Sort key (step, time of the last heartbeat): smallest for the slowest process."""
        return -1 if self.step is None else self.step, self.heartbeat_time

    def describe_progress(self) -> str:
        if self.step is None:
            return f"before its first step, {self.heartbeat_age():.1f} s after it was started"
        return f"in step {self.step}, {self.heartbeat_age():.1f} s after its last heartbeat"

    def describe_exit(self) -> str:
        how = f"ended with code {self.code}"
        if self.code < 0:
            how = f"was killed by {SIGNAL_NAMES.get(-self.code, f'signal {-self.code}')}"
        return f"{self} {how} at {time.strftime('%H:%M:%S')}, {self.describe_progress()}"

    def log_tail(self) -> str:
        """Last 100 kB of the log of this start."""
        if self.log is None:
            return ""
        with self.log.open("rb") as file:
            file.seek(max(self.start, file.seek(0, os.SEEK_END) - 100_000))
            return file.read().decode(errors="replace")

    def lost_peer_message(self) -> str | None:
        """Message in the log about a lost peer, None if there is none."""
        matches = (re.search(text, self.log_tail()) for text in LOST_PEER_PATTERNS)
        first = next((match for match in matches if match), None)
        return " ".join(first.group().split())[:200] if first else None

    def send_signal(self, kind: signal.Signals) -> None:
        self.process.send_signal(kind)

    def kill(self) -> None:
        """Kill the process group: the process and everything it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _terminate_with_parent(parent: int) -> Callable[[], None] | None:
    """Return a preexec_fn for SIGTERM to the child when `parent` dies (Linux only)."""
    if _libc is None:
        return None

    def prepare() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare
