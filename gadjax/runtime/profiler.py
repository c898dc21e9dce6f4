"""Profiles of a few steps, where they are asked for."""

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
    """ "START:N" -> (START, N), in a run of so many steps. Raises: InputError."""
    found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if not found or int(found[2]) < 1:
        raise InputError(
            f"--profile: found {text!r}; expected START:N, the N (1 or more) steps after START"
        )
    if int(found[1]) >= steps:
        raise InputError(
            f"--profile: found {text!r}; expected a START before the last step, {steps}"
        )
    return int(found[1]), int(found[2])


class Profile:
    """Traces N steps after step START of every process, which waits for its devices only there.

    A fault of the profiler is noted and ends the profile, not the run.
    """

    def __init__(self, asked: tuple[int, int] | None, workdir: Path, note: Callable[[str], None]):
        self.steps = None if asked is None else (asked[0], sum(asked))
        self.folder, self.note, self.running = workdir / PROFILE, note, False
        self.local: Any = self.folder  # the profiler writes on disks only

    def before_step(self, done: int, state: Any) -> None:
        """To be told before every step how many are done, and of the newest state."""
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
        """The run ends here."""
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
