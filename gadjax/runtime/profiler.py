"""Profiler traces of a few training steps, on request (--profile START:N)."""

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gadjax.errors import InputError
from gadjax.io.storage import client, is_remote

PROFILE = "profile"  # folder in the workdir; TensorBoard and xprof open it


def parse_profile(text: str, steps: int) -> tuple[int, int]:
    """Parse "START:N" to (START, N); START must be below `steps`. Raises: InputError."""
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if not match or int(match[2]) < 1:
        raise InputError(
            f"--profile: found {text!r}; expected START:N, the N (1 or more) steps after START"
        )
    if int(match[1]) >= steps:
        raise InputError(
            f"--profile: found {text!r}; expected a START before the last step, {steps}"
        )
    return int(match[1]), int(match[2])


class Profile:
    """Profiler trace of the N steps after step START, on every process.

    A process waits for its devices only at both ends of the trace. An error of the profiler is
    reported and ends the trace, not the run.
    """

    def __init__(self, window: tuple[int, int] | None, workdir: Path, note: Callable[[str], None]):
        """Prepare the trace; the methods do the work.

        Args:
            window: (START, N); None for no trace.
            workdir: gets the folder "profile".
            note: prints a line to the terminal and the run's log.
        """
        self.steps = None if window is None else (window[0], sum(window))
        self.folder, self.note, self.running = workdir / PROFILE, note, False
        self.local: Any = self.folder  # the profiler writes on disks only

    def before_step(self, done: int, state: Any) -> None:
        """Start or stop the trace; call before every step, with the steps done and their state."""
        if self.steps is None:
            return
        start, stop = self.steps
        try:
            if self.running and done >= stop:
                self._stop(done, state)
            elif not self.running and done == start:
                jax.block_until_ready(state)
                if is_remote(self.folder):
                    self.local = tempfile.mkdtemp(prefix="gadjax-profile-")
                jax.profiler.start_trace(self.local)
                self.running = True
            elif not self.running and done > start:
                self.steps = None
                self.note(f"no profile: found step {done}; expected to begin at {start}")
        except Exception as error:
            self.steps, self.running = None, False
            self.note(f"no profile: {type(error).__name__}: {' '.join(str(error).split())}")

    def close(self, done: int, state: Any) -> None:
        """Stop a running trace at the end of the run."""
        if self.running:
            self.steps = self.steps[0], done
            self.before_step(done, state)

    def _stop(self, done: int, state: Any) -> None:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        if self.local != self.folder:
            client().put(f"{self.local}/", f"{self.folder}/", recursive=True)
            shutil.rmtree(self.local)
        self.note(f"profile of steps {self.steps[0] + 1} to {done}: {self.folder}")
        self.steps, self.running = None, False
