"""Progress reporting: progress bar, train.log, metrics.jsonl, goodput.json, trackers."""

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
from gadjax.runtime.status import HEALTH
from gadjax.runtime.trackers import Trackers
from gadjax.types import Params

# Limits of uploads to an object store: a growing file is uploaded whole every time, and a client
# retries for long when the store is busy.
UPLOAD_INTERVAL_SECONDS, UPLOAD_TIME_SHARE = 30, 1 / 20


class Progress:
    """Progress of a run on the terminal, in the workdir's logs and in the config's trackers.

    The workdir gets train.log, metrics.jsonl and goodput.json. Metrics are read one step late: at
    step n `update` waits for step n - 1 at most, so the device always has work queued; only `flush`
    waits for n. A terminal shows a progress bar, any other stderr a line every `log.every` steps. A
    resumed run appends, after dropping the metrics of steps that it will repeat. In an object store
    the files are uploaded with a delay (`sync`).
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        start: int = 0,
        clock: GoodputClock | None = None,
        enabled: bool | None = None,
    ):
        """Open the logs, the progress bar and the trackers.

        Args:
            workdir: folder of the run, or a prefix of an object store.
            config: config of the run.
            start: steps done so far.
            clock: goodput clock of this start; every `update` counts a step.
            enabled: True by default on process 0; otherwise every method does nothing.

        Raises:
            RunStopped: the workdir cannot be written. The methods raise it only if
                checkpoint.failures is 0; otherwise they buffer lines until a write succeeds.
        """
        self.enabled = jax.process_index() == 0 if enabled is None else enabled
        self.total, self.batch, self.every = config.steps, config.batch, max(config.log.every, 1)
        self.tolerate_write_errors = config.checkpoint.failures > 0
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.rate_start: tuple[int, float] | None = (
            None  # step and Unix time from which the rate is measured
        )
        self.files: dict[str, AppendFile] = {}
        self.due = 0.0  # time.monotonic() of the next upload
        self.clock = clock or GoodputClock()
        self.bar = None
        if not self.enabled:
            return
        self.workdir = workdir
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            _drop_rows_after(self.workdir / "metrics.jsonl", start)
            _drop_rows_after(self.workdir / HEALTH, start - 1)  # the preview is drawn again
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
        """Report a started step; metrics are scalars that are still on the device."""
        if not self.enabled:
            return
        self.clock.record_step(step)
        before, self.pending = self.pending, (step, metrics)
        if before is not None:
            self._report(*before)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """Send an image [H, W, 3] or images [N, H, W, 3] (uint8) to the trackers."""
        if self.enabled:
            array = np.asarray(array)
            self.trackers.write_images(step, {name: array if array.ndim == 4 else array[None]})

    def health(self, row: dict[str, Any]) -> None:
        """Write a row of health.jsonl, and send its numbers to the trackers as health/NAME."""
        if not self.enabled:
            return
        if HEALTH not in self.files:
            with warn_on_write_error(self.workdir / HEALTH, self.tolerate_write_errors):
                self.files[HEALTH] = AppendFile(self.workdir / HEALTH)
        if HEALTH in self.files:
            self._write(HEALTH, json.dumps(row))
        numbers = {f"health/{k}": v for k, v in row.items() if isinstance(v, float)}
        self.trackers.write_scalars(row["step"], numbers)

    def note(self, text: str) -> None:
        """Print lines above the progress bar and add them to train.log."""
        if not self.enabled:
            return
        self._log(text)
        with suppress(OSError):  # a closed terminal or pipe does not end the run
            if self.bar is None:
                print(text, file=sys.stderr, flush=True)
            else:
                self.bar.write(text, file=sys.stderr)

    def sync(self) -> None:
        """Write goodput.json, and upload the logs if the workdir is in an object store.

        A failed upload is retried when the next lines are due.
        """
        if not self.files:
            return
        began = time.monotonic()
        for file in self.files.values() if is_remote(self.workdir) else ():
            with warn_on_write_error(file.path):
                file.upload()
        with warn_on_write_error(self.workdir / GOODPUT, self.tolerate_write_errors):
            self.clock.write()
        now = time.monotonic()
        self.due = (
            now + max(UPLOAD_INTERVAL_SECONDS, (now - began) / UPLOAD_TIME_SHARE)
            if is_remote(self.workdir)
            else 0.0
        )

    def flush(self) -> None:
        """Wait for the newest step, report it and `sync`.

        Call before a save: a run that resumes from it does not repeat that step.
        """
        if not self.files:
            return
        last, self.pending = self.pending, None
        if last is not None:
            self._report(*last)
        self.sync()

    def close(self) -> None:
        """Report the last step and close logs and trackers; further calls do nothing."""
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
        """Write the metrics of a step if due; waits for it, so call it with a later step queued."""
        due = step % self.every == 0 or step == self.total
        if not due and self.rate_start is not None:
            return
        numbers = jax.device_get(list(metrics.values()))
        values = {name: float(number) for name, number in zip(metrics, numbers, strict=True)}
        now = time.time()
        rate = None  # the first step compiles, so the rate counts from its end
        if self.rate_start is not None and now > self.rate_start[1]:
            rate = (step - self.rate_start[0]) / (now - self.rate_start[1])
        self.rate_start = step, now
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
        with warn_on_write_error(self.workdir / name, self.tolerate_write_errors):
            self.files[name].add(line)


def parameter_table(params: Params) -> str:
    """Format a table of all parameters: path, shape, size, dtype, and the total."""
    from clu import parameter_overview

    return parameter_overview.get_parameter_overview(params, include_stats=False)


def _drop_rows_after(path: Path, step: int) -> None:
    """Drop the rows of steps after `step`, and lines truncated by a kill or a bad disk."""
    if not path.exists():
        return
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    kept = [line for line in lines if (done := _step_of(line)) is not None and done <= step]
    if kept != lines:
        write_atomic(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
