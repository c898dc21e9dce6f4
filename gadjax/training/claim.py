"""A workdir belongs to one run at a time, and says how that run stands."""

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from gadjax.errors import InputError
from gadjax.training.atomic import write_whole

STATUS = "status.json"
LOCK = "lock"


class Claim:
    """The hold of a run on its workdir, which ends with process 0, however that ends.

    status.json: {"status": "running", "done", "preempted" or "stopped", "step", "steps", "time",
    "reason", "text"}; text is what a person reads ("preempted at step 40").
    """

    def __init__(self, workdir: Path, steps: int, mine: bool = True):
        """mine: whether this process is the one to hold it and to write.

        Raises: InputError where another run holds the workdir, or it cannot be written.
        """
        self.workdir, self.steps, self.mine, self.step = workdir, steps, mine, 0
        if not mine:
            return
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self.lock = open(workdir / LOCK, "a+")  # held as long as the run
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.lock.seek(0)
            holder = self.lock.read().strip() or "unknown"
            raise InputError(
                f"{workdir}: found another run that writes to it ({holder}); expected one at a time"
            ) from error
        except OSError as error:
            raise InputError(
                f"{workdir}: found a folder that cannot be written ({error.strerror}); expected "
                "one that can"
            ) from error
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.lock.flush()

    def say(self, status: str, step: int, reason: str = "") -> None:
        """Write status.json; where there is no room for it, nothing."""
        self.step = step
        if not self.mine:
            return
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
            write_whole(self.workdir / STATUS, json.dumps(said) + "\n")

    def __enter__(self) -> "Claim":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.say("stopped", self.step, " ".join(str(error).split()) or type(error).__name__)
        if self.mine:
            self.lock.close()
