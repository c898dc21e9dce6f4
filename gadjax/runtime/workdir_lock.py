"""Workdir lock: one run at a time per workdir, and its status.json."""

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from gadjax.errors import InputError, RunStopped
from gadjax.io.storage import is_remote, put_object, store_errors, write_atomic

STATUS = "status.json"
LOCK = "lock"
# An object store does not notice a dead process, so the owner of a lock there renews it every
# RENEW_SECONDS, and a lock that was not renewed for STALE_SECONDS has no owner: long enough for a
# client to get over a store that fails, short enough for a start after a crash to wait for it.
RENEW_SECONDS, STALE_SECONDS, POLL_SECONDS = 20, 120, 2

log = logging.getLogger(__name__)


class WorkdirLock:
    """Exclusive lock of a run on its workdir; it ends with process 0, however that ends.

    A file lock in a folder, a renewed lease in an object store. The owner writes status.json:
    {"status": "running", "done", "preempted" or "stopped", "step", "steps", "time" (Unix seconds),
    "reason", "text"}; text is the human-readable form ("preempted at step 40").
    """

    def __init__(self, workdir: Path, steps: int, is_owner: bool = True):
        """Take the lock.

        Args:
            workdir: folder of the run, or a prefix of an object store.
            steps: total steps of the run, for status.json.
            is_owner: True on the one process that takes the lock and writes status.json.

        Raises:
            InputError: another run holds the lock, or the workdir cannot be written.
        """
        self.workdir, self.steps, self.is_owner, self.step = workdir, steps, is_owner, 0
        if not is_owner:
            return
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self.lock = (_Lease if is_remote(workdir) else _Flock)(workdir / LOCK)
        except LockHeld as error:
            raise InputError(
                f"{workdir}: found another run that writes to it ({error}); expected one at a time"
            ) from error
        except OSError as error:
            raise InputError(
                f"{workdir}: found a folder that cannot be written ({error.strerror}); expected "
                "one that can"
            ) from error

    def write_status(self, status: str, step: int, reason: str = "") -> None:
        """Write status.json; a failed write is ignored (no space left, for example).

        Args:
            status: "running", "done", "preempted" or "stopped".
            step: steps done.
            reason: of a stopped run.

        Raises:
            RunStopped: another run has taken the lock.
        """
        self.step = step
        if not self.is_owner:
            return
        if self.lock.lost:
            raise RunStopped(f"{self.workdir}: found another run that took it over")
        text = {"preempted": f"preempted at step {step}", "stopped": f"stopped: {reason}"}
        record = {
            "status": status,
            "step": step,
            "steps": self.steps,
            "time": round(time.time(), 3),
            "reason": reason,
            "text": text.get(status, status),
        }
        with suppress(OSError):
            write_atomic(self.workdir / STATUS, json.dumps(record) + "\n")

    def __enter__(self) -> "WorkdirLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.is_owner:
            return
        if error is not None and not self.lock.lost:
            self.write_status(
                "stopped", self.step, " ".join(str(error).split()) or type(error).__name__
            )
        self.lock.close()


class LockHeld(Exception):
    """Another run holds the lock; str() names it."""


class _Flock:
    """File lock (flock), held until the process ends."""

    lost = False

    def __init__(self, path: Path):
        """Raises: LockHeld; OSError."""
        self.file = open(path, "a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.seek(0)
            raise LockHeld(self.file.read().strip() or "unknown") from error
        self.file.truncate(0)
        self.file.write(_me())
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _Lease:
    """Lease: a lock object in a store, renewed by a thread and removed when the run ends.

    If two starts find no lock, only one gets it. Two starts that take over the same stale lock at
    the same instant are not excluded, nor is a run that was cut off from the store for
    STALE_SECONDS: its next renewal shows the other owner, and it stops at its next checkpoint.
    """

    def __init__(self, path: Any):
        """Take the lease, after waiting for a lock that is not renewed to become stale.

        Raises: LockHeld; OSError.
        """
        self.path, self.lost, self.ended = path, False, threading.Event()
        self.token = uuid.uuid4().hex
        content = self._read()
        if content is not None:
            self._wait_until_stale(content)
            path.unlink(missing_ok=True)
        try:
            self._write(new=True)
        except FileExistsError as error:
            raise LockHeld("which started at the same moment") from error
        self.thread = threading.Thread(target=self._renew, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        if not self.lost:
            with suppress(OSError), store_errors(self.path):
                self.path.unlink(missing_ok=True)

    def _wait_until_stale(self, content: str) -> None:
        try:
            lock = json.loads(content)
            holder, age = str(lock["holder"]), time.time() - float(lock["time"])
        except (ValueError, LookupError, TypeError):
            holder, age = "unknown", 0.0
        if age >= STALE_SECONDS:
            return
        # At most STALE_SECONDS: the clock of the holder may be ahead of this one.
        until = time.monotonic() + min(STALE_SECONDS, STALE_SECONDS - age)
        log.warning("%s: found %s; waiting whether it still renews the lock", self.path, holder)
        while time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            if (now := self._read()) is None:
                return
            if now != content:
                raise LockHeld(holder)

    def _renew(self) -> None:
        while not self.ended.wait(RENEW_SECONDS):
            with suppress(OSError):  # the next renewal retries
                if self.token not in (self._read() or self.token):
                    self.lost = True
                    return
                self._write()

    def _read(self) -> str | None:
        with store_errors(self.path):
            try:
                return self.path.read_text()
            except FileNotFoundError:
                return None

    def _write(self, new: bool = False) -> None:
        lock = json.dumps({"holder": _me(), "time": time.time(), "token": self.token})
        put_object(self.path, lock.encode(), new)


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
