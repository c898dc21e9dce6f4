"""Supervisor of a run's processes: exits, hangs, signals, one exit code.

JAX aborts a process that loses a peer without running any Python, so a process outside has to
report which one ended, how and when. It also prints the stacks of a step that hangs and ends the
remaining processes. It imports nothing heavy, so that it always responds.
"""

import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gadjax.io.storage import write_atomic
from gadjax.runtime.child_process import SIGNAL_NAMES, Child

POLL_SECONDS = 0.1
STACK_SECONDS = 2.0  # for hung processes to print their stacks
EXIT_GRACE_SECONDS = 2.0  # for the others to exit by themselves after an orderly exit
ORDERLY_EXIT_CODES = {2, 3}  # of a process that has printed the reason, on one line
TAIL_LINES = 15  # of a failed process's log
RANK_VARIABLES = "JAX_PROCESS_ID", "SLURM_PROCID", "TPU_WORKER_ID"  # rank of a host's only process
FORWARDED_SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@dataclass(frozen=True)
class Limits:
    """Time limits of a supervisor, in seconds.

    hang: without a step until a process counts as hung, 0 for never. grace: from SIGTERM to
    SIGKILL. start: added to `hang` until the first step is done, which loads and compiles.
    """

    hang: float = 1800
    grace: float = 30
    start: float = 3600


def supervise(
    commands: list[list[str]],
    limits: Limits = Limits(),  # noqa: B008 (it cannot change)
    logs: Path | None = None,
    workdir: Path | None = None,
) -> int:
    """Run the commands, one process each, until all have ended.

    Several processes get JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; a single
    one finds its peers by the environment. SIGTERM, SIGUSR1 and SIGINT are forwarded as SIGTERM; a
    third signal kills the processes. Must be called in the main thread.

    Args:
        commands: argument lists, one a process.
        limits: time limits for hangs and for ending processes.
        logs: folder of process-RANK.log, which are appended to; the first one is shown as well.
            None: all processes write to this process's stdout and stderr.
        workdir: gets the status "stopped" in status.json if the processes could not write it.

    Returns:
        0 if all processes returned 0; 2 if one returned 2; otherwise 3.
    """
    with tempfile.TemporaryDirectory(prefix="gadjax-launch-") as folder:
        supervisor = _Supervisor(limits, workdir)
        handlers = {
            kind: signal.signal(kind, supervisor.record_signal) for kind in FORWARDED_SIGNALS
        }
        try:
            supervisor.start(commands, Path(folder), logs)
            return supervisor.watch()
        finally:
            supervisor.close()
            for kind, handler in handlers.items():
                signal.signal(kind, handler)


class _Supervisor:
    """State of `supervise`: the child processes, received signals, and the first fault."""

    def __init__(self, limits: Limits, workdir: Path | None):
        self.limits, self.workdir = limits, workdir
        self.children: list[Child] = []
        self.received: list[int] = []  # signals
        self.forwarded = 0  # number of received signals that were forwarded
        self.fault: str | None = None
        self.final = True  # another start would end in the same fault
        self.term_at = self.kill_at = math.inf
        self.shown_log: BinaryIO | None = None  # the first process's log

    def record_signal(self, number, frame) -> None:
        self.received.append(number)

    def start(self, commands: list[list[str]], folder: Path, logs: Path | None) -> None:
        """Start the processes, with heartbeat files in `folder` and logs in `logs`."""
        count, port = len(commands), free_port()
        for i, command in enumerate(commands):
            environment = {"GADJAX_HEARTBEAT": str(folder / str(i))}
            if logs:
                environment["PYTHONUNBUFFERED"] = "1"
            if count > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(i),
                }
            number = i if count > 1 else _process_rank()
            log = logs / f"process-{number}.log" if logs else None
            self.children.append(Child(number, command, environment, log))
        if logs:
            self.shown_log = self.children[0].log.open("rb")
            self.shown_log.seek(self.children[0].start)

    def alive(self) -> list[Child]:
        return [child for child in self.children if child.code is None]

    def close(self) -> None:
        """Kill the processes that are left, whatever happened before."""
        for child in self.alive():
            child.kill()
            child.process.wait()
        if self.shown_log:
            self.shown_log.close()

    def watch(self) -> int:
        """Poll until all processes have ended; return the exit code of `supervise`."""
        while self.alive():
            time.sleep(POLL_SECONDS)
            self._forward_signals()
            ended = [child for child in self.children if child.poll()]
            self._show_log()
            if self.fault is None:
                self._handle_exits([child for child in ended if child.code])
            self._escalate()
        self._show_log()
        if 2 in (child.code for child in self.children):
            return 2
        if self.fault is None:
            return 0
        if self.final and not self.received and self.workdir:
            _write_stopped_status(self.workdir / "status.json", self.fault)
        return 3

    def _forward_signals(self) -> None:
        while self.forwarded < len(self.received):
            kind = SIGNAL_NAMES[self.received[self.forwarded]]
            self.forwarded += 1
            if self.forwarded > 2:
                _print_message(f"{kind}: killing the processes")
                self.fault = self.fault or f"was killed by a third signal, {kind}"
                self.kill_at = 0
                return
            _print_message(
                f"{kind}: asked the processes to save and exit; a third signal kills them"
            )
            for child in self.alive():
                child.send_signal(signal.SIGTERM)

    def _show_log(self) -> None:
        """Copy the new output of the first process's log to stdout."""
        if self.shown_log and (text := self.shown_log.read()):
            try:
                sys.stdout.buffer.write(text)
                sys.stdout.buffer.flush()
            except OSError:
                self.shown_log = None  # the terminal is gone, the log is not

    def _handle_exits(self, failed: list[Child]) -> None:
        """Report a process that failed or hangs, and schedule the end of the others."""
        if not failed:
            return self._handle_hang()
        # An abort in the same poll as another exit is a consequence of that exit.
        child = min(failed, key=lambda child: (child.code == -signal.SIGABRT, -child.code))
        self.fault = child.describe_exit()
        orderly, is_single = child.code in ORDERLY_EXIT_CODES, len(self.children) == 1
        if child.code == -signal.SIGABRT:
            message = child.lost_peer_message()
            if message:
                self.fault += f"; a peer was lost: {message}"
            # The peer's supervisor reports the cause; a run that lost a machine is worth a restart.
            self.final = not (is_single and (message or child.log is None))
        if not (orderly and is_single):
            _print_message(self.fault + "; ending the others" * bool(self.alive()))
        if child is not self.children[0] and child.log:
            lines = [line.rpartition("\r")[2] for line in child.log_tail().rstrip().split("\n")]
            _print_message("\n  ".join([f"the end of {child.log}:", *lines[-TAIL_LINES:]]))
        self._schedule_termination(EXIT_GRACE_SECONDS if orderly else 0)

    def _handle_hang(self) -> None:
        alive, limits = self.alive(), self.limits
        if not limits.hang or not any(c.is_hung(limits.hang, limits.start) for c in alive):
            return
        behind = min(alive, key=Child.progress)
        hung = f"{behind} hangs {behind.describe_progress()}"
        for child in alive:
            child.send_signal(signal.SIGUSR2)
        time.sleep(STACK_SECONDS)
        self._show_log()
        location = "above" if behind.log is None else f"in {behind.log.parent}"
        self.fault = f"{hung}; the stacks of all threads are {location}"
        _print_message(f"{self.fault}; ending all")
        self._schedule_termination(0)

    def _schedule_termination(self, seconds: float) -> None:
        self.term_at = time.monotonic() + seconds
        self.kill_at = self.term_at + self.limits.grace

    def _escalate(self) -> None:
        now = time.monotonic()
        if now >= self.kill_at:
            for child in self.alive():
                child.kill()
        elif now >= self.term_at:
            self.term_at = math.inf
            for child in self.alive():
                child.send_signal(signal.SIGTERM)


def _print_message(text: str) -> None:
    start = "\n" if sys.stderr.isatty() else ""  # not at the end of a progress bar
    try:
        print(f"{start}gadjax launch: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass  # the terminal is gone; the processes still need a supervisor


def _write_stopped_status(path: Path, reason: str) -> None:
    """Set status.json to "stopped" if it still has the status "running"."""
    try:
        status = json.loads(path.read_text())
        if status["status"] != "running":
            return
        status |= {"status": "stopped", "time": time.time(), "reason": reason}
        status["text"] = f"stopped: {reason}"
        write_atomic(path, json.dumps(status) + "\n")
    except FileNotFoundError:
        pass  # the run ended before it wrote a status
    except Exception as error:  # clients of object stores raise any type
        _print_message(f"{path}: found {error}; expected to write there that the run stopped")


def _process_rank() -> int:
    values = [os.environ.get(name, "") for name in RANK_VARIABLES]
    return int(next((text for text in values if text.isdecimal()), "0"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
