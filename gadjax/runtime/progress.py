"""What a run says while it goes: a bar, log lines, metrics.jsonl, and what trackers are told."""

import json
import math
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from gadjax.errors import RunStopped
from gadjax.io.append_file import AppendFile
from gadjax.io.storage import is_remote, warn_on_write_error, write_atomic
from gadjax.runtime.goodput import GOODPUT, GoodputClock
from gadjax.runtime.trackers import Trackers
from gadjax.types import Params

# An object store is written to at most so often, and for at most this part of the time: a file that
# grows is uploaded whole, and one that is refused for being busy is asked for again and again.
PAUSE, PART = 30, 1 / 20


class Progress:
    """Reports to the terminal, into the workdir (train.log, metrics.jsonl, goodput.json) and to the
    config's trackers.

    Metrics are read one step late: when `update` is told of step n, it waits for step n - 1 at
    most, so the device always has work queued; only `flush` waits for n. The terminal shows a bar
    where it is one, and a line every `log.every` steps where it is not. A resumed run appends,
    after dropping the metrics of steps that it will do again. On an object store the files follow
    with a delay (`sync`).
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        start: int = 0,
        clock: GoodputClock | None = None,
        enabled: bool | None = None,
    ):
        """start: steps done so far. clock: of this start, told of every step. enabled: by default
        on process 0; elsewhere every method does nothing.

        Raises: RunStopped where the workdir cannot be written; in the methods only where the
        config allows no failures of checkpoints, else lines are held until they can be written.
        """
        self.enabled = jax.process_index() == 0 if enabled is None else enabled
        self.total, self.batch, self.every = config.steps, config.batch, max(config.log.every, 1)
        self.patient = config.checkpoint.failures > 0
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.mark: tuple[int, float] | None = None  # step and time that the rate counts from
        self.files: dict[str, AppendFile] = {}
        self.due = 0.0  # when a store is written to again
        self.clock = clock or GoodputClock()
        self.bar = None
        if not self.enabled:
            return
        self.workdir = workdir
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            _keep_until(self.workdir / "metrics.jsonl", start)
            for file in ("train.log", "metrics.jsonl"):
                self.files[file] = AppendFile(self.workdir / file)
        except OSError as error:
            text = error.strerror or error
            raise RunStopped(f"{self.workdir}: cannot be written: {text}") from error
        self.clock.resume(self.workdir, start)
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=self.total, initial=start, unit="step", dynamic_ncols=True, leave=True
            )
        self.trackers = Trackers(self.workdir, config, self.note)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, step: int, metrics: dict[str, jax.Array | float]) -> None:
        """Tell of a step that was started; metrics are scalars, still on the device."""
        if not self.enabled:
            return
        self.clock.stepped(step)
        before, self.pending = self.pending, (step, metrics)
        if before is not None:
            self._report(*before)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """A picture [H, W, 3] or pictures [N, H, W, 3] in uint8, for the trackers."""
        if self.enabled:
            array = np.asarray(array)
            self.trackers.write_images(step, {name: array if array.ndim == 4 else array[None]})

    def note(self, text: str) -> None:
        """Print lines above the bar, and log them."""
        if not self.enabled:
            return
        self._log(text)
        with suppress(OSError):  # a terminal or a pipe that is gone ends no run
            if self.bar is None:
                print(text, file=sys.stderr, flush=True)
            else:
                self.bar.write(text, file=sys.stderr)

    def sync(self) -> None:
        """Bring goodput.json up to date, and in an object store all that was said so far.

        A store that fails is asked again when the next lines are due.
        """
        if not self.files:
            return
        began = time.monotonic()
        for file in self.files.values() if is_remote(self.workdir) else ():
            with warn_on_write_error(file.path):
                file.upload()
        with warn_on_write_error(self.workdir / GOODPUT, self.patient):
            self.clock.write()
        now = time.monotonic()
        self.due = now + max(PAUSE, (now - began) / PART) if is_remote(self.workdir) else 0.0

    def flush(self) -> None:
        """Report the newest step too, which waits for it, and `sync`. Before a save: a run that is
        resumed there does not do that step again."""
        if not self.files:
            return
        last, self.pending = self.pending, None
        if last is not None:
            self._report(*last)
        self.sync()

    def close(self) -> None:
        """Report the last step and close the files. A second call does nothing."""
        if not self.files:
            return
        try:
            self.flush()
        finally:
            if self.bar is not None:
                self.bar.close()
            self.trackers.close()
            for file in self.files.values():
                file.close()
            self.files, self.enabled = {}, False

    def _report(self, step: int, metrics: dict[str, Any]) -> None:
        """Write what is due after a step; waits for it, so call it when a later one is queued."""
        due = step % self.every == 0 or step == self.total
        if not due and self.mark is not None:
            return
        numbers = jax.device_get(list(metrics.values()))
        values = {name: float(number) for name, number in zip(metrics, numbers, strict=True)}
        now = time.time()
        rate = None  # the first step compiles, so it only starts the clock
        if self.mark is not None and now > self.mark[1]:
            rate = (step - self.mark[0]) / (now - self.mark[1])
        self.mark = step, now
        if not due:
            return
        images = None if rate is None else round(rate * self.batch, 3)
        row = {"step": step, "time": round(now, 3), "images_per_second": images}
        row["goodput"] = round(self.clock.share(), 4)
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._write("metrics.jsonl", json.dumps(row))
        if time.monotonic() >= self.due:
            self.sync()
        parts = [f"step {step}/{self.total}"]
        parts += [f"{name} {value:.4g}" for name, value in values.items()]
        if rate is not None:
            left = timedelta(seconds=round((self.total - step) / rate))
            parts += [f"{images:.4g} images/s", f"ETA {left}"]
            values["images_per_second"] = images
        line = "  ".join(parts)
        self._log(line)
        if self.bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self.bar.set_postfix_str("  ".join(parts[1:]), refresh=False)
        self.trackers.write_scalars(step, values | {"goodput": row["goodput"]})

    def _log(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        for line in text.splitlines():
            self._write("train.log", f"{stamp}  {line}")

    def _write(self, name: str, line: str) -> None:
        with warn_on_write_error(self.workdir / name, self.patient):
            self.files[name].add(line)


def parameter_table(params: Params) -> str:
    """A table of every parameter's path, shape, size and dtype, and their total."""
    from clu import parameter_overview

    return parameter_overview.get_parameter_overview(params, include_stats=False)


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and what a killed run or a bad disk left of a line."""
    if not path.exists():
        return
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    kept = [line for line in lines if (done := _step(line)) is not None and done <= step]
    if kept != lines:
        write_atomic(path, "".join(f"{line}\n" for line in kept))


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
