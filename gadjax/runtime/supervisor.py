"""Watches over the processes of a run: JAX ends those that lose a peer without running Python.

It says which process ended, how and when, prints the stacks of a step that hangs, ends the other
processes and returns one exit code. It imports nothing heavy, so that it always answers.
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
from gadjax.runtime.child_process import NAMES, Child

POLL = 0.1  # seconds between looks
STACKS = 2.0  # seconds in which processes print their stacks
PARTING = 2.0  # seconds in which the others end by themselves where one ended in order
ORDERLY = {2, 3}  # exit codes of a process that has said why, on one line
TAIL = 15  # lines of a log that are shown
NUMBERS = "JAX_PROCESS_ID", "SLURM_PROCID", "TPU_WORKER_ID"  # who a host's only process is
ASKING = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@dataclass(frozen=True)
class Limits:
    """Seconds. hang: without a step until a process counts as hung, 0 for never; start: how many
    more until its first step is over, which loads and compiles. grace: from SIGTERM to SIGKILL."""

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

    Several are told by JAX_COORDINATOR_ADDRESS and its like who they are; one finds its peers by
    what the environment says. SIGTERM, SIGUSR1 and SIGINT are handed on as SIGTERM, a third one
    kills. Must be called in the main thread.

    logs: a folder for process-I.log, to which is added, the first being shown as well; without
      one all write to this process's own stdout and stderr.
    workdir: where status.json is to say "stopped" when processes could not say it themselves.
    Returns: 0 where all returned 0; 2 where one did; else 3.
    """
    with tempfile.TemporaryDirectory(prefix="gadjax-launch-") as folder:
        supervisor = _Supervisor(limits, workdir)
        before = {kind: signal.signal(kind, supervisor.note) for kind in ASKING}
        try:
            supervisor.start(commands, Path(folder), logs)
            return supervisor.watch()
        finally:
            supervisor.close()
            for kind, handler in before.items():
                signal.signal(kind, handler)


class _Supervisor:
    def __init__(self, limits: Limits, workdir: Path | None):
        self.limits, self.workdir = limits, workdir
        self.children: list[Child] = []
        self.asked: list[int] = []  # the signals that came
        self.handed = 0  # and how many of them were handed on
        self.fault: str | None = None
        self.final = True  # whether another start would end in the same fault
        self.term_at = self.kill_at = math.inf
        self.view: BinaryIO | None = None  # the first process's log

    def note(self, number, frame) -> None:
        self.asked.append(number)

    def start(self, commands: list[list[str]], folder: Path, logs: Path | None) -> None:
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
            number = i if count > 1 else _own_number()
            log = logs / f"process-{number}.log" if logs else None
            self.children.append(Child(number, command, environment, log))
        if logs:
            self.view = self.children[0].log.open("rb")
            self.view.seek(self.children[0].start)

    def alive(self) -> list[Child]:
        return [child for child in self.children if child.code is None]

    def close(self) -> None:
        """Leave no process behind, whatever happened here."""
        for child in self.alive():
            child.kill()
            child.process.wait()
        if self.view:
            self.view.close()

    def watch(self) -> int:
        while self.alive():
            time.sleep(POLL)
            self._hand_on()
            ended = [child for child in self.children if child.look()]
            self._show()
            if self.fault is None:
                self._judge([child for child in ended if child.code])
            self._press()
        self._show()
        if 2 in (child.code for child in self.children):
            return 2
        if self.fault is None:
            return 0
        if self.final and not self.asked and self.workdir:
            _write_stopped_status(self.workdir / "status.json", self.fault)
        return 3

    def _hand_on(self) -> None:
        while self.handed < len(self.asked):
            kind = NAMES[self.asked[self.handed]]
            self.handed += 1
            if self.handed > 2:
                _say(f"{kind}: killing the processes")
                self.fault = self.fault or f"was killed by a third signal, {kind}"
                self.kill_at = 0
                return
            _say(f"{kind}: told the processes to save and leave; a third signal kills them")
            for child in self.alive():
                child.tell(signal.SIGTERM)

    def _show(self) -> None:
        """What the first process wrote since the last look."""
        if self.view and (text := self.view.read()):
            try:
                sys.stdout.buffer.write(text)
                sys.stdout.buffer.flush()
            except OSError:
                self.view = None  # the terminal is gone, the log is not

    def _judge(self, failed: list[Child]) -> None:
        """Where a process failed or hangs, say so and let the others end."""
        if not failed:
            return self._judge_silence()
        # An abort seen in the same look as another end is that one's consequence.
        child = min(failed, key=lambda child: (child.code == -signal.SIGABRT, -child.code))
        self.fault = child.ending()
        orderly, alone = child.code in ORDERLY, len(self.children) == 1
        if child.code == -signal.SIGABRT:
            lost = child.peer_lost()
            if lost:
                self.fault += f"; a peer was lost: {lost}"
            # The peer's own supervisor says why; a machine that went away is worth another start.
            self.final = not (alone and (lost or child.log is None))
        if not (orderly and alone):
            _say(self.fault + "; ending the others" * bool(self.alive()))
        if child is not self.children[0] and child.log:
            lines = [line.rpartition("\r")[2] for line in child.said().rstrip().split("\n")]
            _say("\n  ".join([f"the end of {child.log}:", *lines[-TAIL:]]))
        self._end_after(PARTING if orderly else 0)

    def _judge_silence(self) -> None:
        alive, limits = self.alive(), self.limits
        if not limits.hang or not any(c.hangs(limits.hang, limits.start) for c in alive):
            return
        behind = min(alive, key=Child.progress)
        hung = f"{behind} hangs {behind.place()}"
        for child in alive:
            child.tell(signal.SIGUSR2)
        time.sleep(STACKS)
        self._show()
        place = "above" if behind.log is None else f"in {behind.log.parent}"
        self.fault = f"{hung}; the stacks of all threads are {place}"
        _say(f"{self.fault}; ending all")
        self._end_after(0)

    def _end_after(self, seconds: float) -> None:
        self.term_at = time.monotonic() + seconds
        self.kill_at = self.term_at + self.limits.grace

    def _press(self) -> None:
        now = time.monotonic()
        if now >= self.kill_at:
            for child in self.alive():
                child.kill()
        elif now >= self.term_at:
            self.term_at = math.inf
            for child in self.alive():
                child.tell(signal.SIGTERM)


def _say(text: str) -> None:
    start = "\n" if sys.stderr.isatty() else ""  # not at the end of a progress bar
    try:
        print(f"{start}gadjax launch: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass  # the terminal is gone; the processes are still to be watched


def _write_stopped_status(path: Path, reason: str) -> None:
    """Of a run that its status.json still takes to be running."""
    try:
        status = json.loads(path.read_text())
        if status["status"] != "running":
            return
        status |= {"status": "stopped", "time": time.time(), "reason": reason}
        status["text"] = f"stopped: {reason}"
        write_atomic(path, json.dumps(status) + "\n")
    except FileNotFoundError:
        pass  # it had not come so far
    except Exception as error:  # a store's clients raise anything
        _say(f"{path}: found {error}; expected to note there that the run stopped")


def _own_number() -> int:
    texts = [os.environ.get(name, "") for name in NUMBERS]
    return int(next((text for text in texts if text.isdecimal()), "0"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
