"""A workdir belongs to one run at a time, and says how that run stands."""

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
# Seconds. A store knows of no process that died, so the holder of a lock there writes it again
# every RENEW_SECONDS seconds, and one that was not renewed for STALE_SECONDS is nobody's: long enough for a client
# to get over a store that fails, short enough to be waited for by a start after a crash.
RENEW_SECONDS, STALE_SECONDS, POLL_SECONDS = 20, 120, 2

log = logging.getLogger(__name__)


class WorkdirLock:
    """The hold of a run on its workdir, which ends with process 0, however that ends.

    status.json: {"status": "running", "done", "preempted" or "stopped", "step", "steps", "time",
    "reason", "text"}; text is what a person reads ("preempted at step 40").
    """

    def __init__(self, workdir: Path, steps: int, is_owner: bool = True):
        """mine: whether this process is the one to hold it and to write.

        Raises: InputError where another run holds the workdir, or it cannot be written.
        """
        self.workdir, self.steps, self.is_owner, self.step = workdir, steps, is_owner, 0
        if not is_owner:
            return
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self.lock = (_Lease if is_remote(workdir) else _Flock)(workdir / LOCK)
        except _Held as error:
            raise InputError(
                f"{workdir}: found another run that writes to it ({error}); expected one at a time"
            ) from error
        except OSError as error:
            raise InputError(
                f"{workdir}: found a folder that cannot be written ({error.strerror}); expected "
                "one that can"
            ) from error

    def write_status(self, status: str, step: int, reason: str = "") -> None:
        """Write status.json; where there is no room for it, nothing.

        Raises: RunStopped where the workdir has become another run's.
        """
        self.step = step
        if not self.is_owner:
            return
        if self.lock.lost:
            raise RunStopped(f"{self.workdir}: found another run that took it over")
        text = {"preempted": f"preempted at step {step}", "stopped": f"stopped: {reason}"}
        said = {
            "status": status,
            "step": step,
            "steps": self.steps,
            "time": round(time.time(), 3),
            "reason": reason,
            "text": text.get(status, status),
        }
        with suppress(OSError):
            write_atomic(self.workdir / STATUS, json.dumps(said) + "\n")

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


class _Held(Exception):
    """By whom."""


class _Flock:
    """Held until the process ends."""

    lost = False

    def __init__(self, path: Path):
        """Raises: _Held; OSError."""
        self.file = open(path, "a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.seek(0)
            raise _Held(self.file.read().strip() or "unknown") from error
        self.file.truncate(0)
        self.file.write(_me())
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _Lease:
    """An object in a store, renewed by a thread, and removed when the run ends.

    Of two starts that find no lock one gets it. Two that take over the same stale lock in the same
    instant are not excluded, nor is a run that was cut off from the store for STALE_SECONDS seconds: it
    learns of the other with its next renewal, and stops with its next checkpoint.
    """

    def __init__(self, path: Any):
        """Waits for a lock that is not renewed to grow stale. Raises: _Held; OSError."""
        self.path, self.lost, self.ended = path, False, threading.Event()
        self.token = uuid.uuid4().hex
        found = self._read()
        if found is not None:
            self._outwait(found)
            path.unlink(missing_ok=True)
        try:
            self._write(new=True)
        except FileExistsError as error:
            raise _Held("which began this moment") from error
        self.thread = threading.Thread(target=self._renew, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        if not self.lost:
            with suppress(OSError), store_errors(self.path):
                self.path.unlink(missing_ok=True)

    def _outwait(self, found: str) -> None:
        try:
            lock = json.loads(found)
            holder, age = str(lock["holder"]), time.time() - float(lock["time"])
        except (ValueError, LookupError, TypeError):
            holder, age = "unknown", 0.0
        if age >= STALE_SECONDS:
            return
        until = time.monotonic() + min(
            STALE_SECONDS, STALE_SECONDS - age
        )  # a clock may be ahead of this one
        log.warning("%s: found %s; waiting whether it still writes", self.path, holder)
        while time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            if (now := self._read()) is None:
                return
            if now != found:
                raise _Held(holder)

    def _renew(self) -> None:
        while not self.ended.wait(RENEW_SECONDS):
            with suppress(OSError):  # it is tried again
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
        said = json.dumps({"holder": _me(), "time": time.time(), "token": self.token})
        put_object(self.path, said.encode(), new)


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
