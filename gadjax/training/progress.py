"""What a run says while it goes: a bar, log lines, metrics.jsonl, TensorBoard."""

import json
import math
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from gadjax.errors import RunStopped
from gadjax.types import Params

TENSORBOARD = "tensorboard"  # folder of its events in the workdir


class Progress:
    """Reports to the terminal and into the workdir: train.log, metrics.jsonl, tensorboard/.

    Metrics are read one step late: when `update` is told of step n, it waits for step n - 1 at
    most, so the device always has work queued. The terminal shows a bar where it is one, and a
    line every `every` steps where it is not. A resumed run appends, after dropping the metrics of
    steps that it will do again.
    """

    def __init__(
        self,
        workdir: Path,
        total: int,
        start: int = 0,
        batch: int = 1,
        every: int = 10,
        name: str = "train",
        enabled: bool | None = None,
    ):
        """total, start: steps at the end and now. batch: images a step. enabled: by default on
        process 0; elsewhere every method does nothing.

        Raises: RunStopped, here and in every method, where the workdir cannot be written.
        """
        self.enabled = jax.process_index() == 0 if enabled is None else enabled
        self.total, self.batch, self.every = total, batch, max(every, 1)
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.mark: tuple[int, float] | None = None  # step and time that the rate counts from
        self.files: dict[str, TextIO] = {}
        self.board = self.bar = None
        if not self.enabled:
            return
        self.workdir = Path(workdir)
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            _keep_until(self.workdir / "metrics.jsonl", start)
            for file in ("train.log", "metrics.jsonl"):
                self.files[file] = (self.workdir / file).open("a", encoding="utf-8")
        except OSError as error:
            raise _stopped(self.workdir, error) from error
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=total, initial=start, desc=name, unit="step", dynamic_ncols=True, leave=True
            )
        self._start_board()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, step: int, metrics: dict[str, jax.Array | float]) -> None:
        """Tell of a step that was started; metrics are scalars, still on the device."""
        if not self.enabled:
            return
        before, self.pending = self.pending, (step, metrics)
        if before is not None:
            self._report(*before)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """A picture [H, W, 3] or pictures [N, H, W, 3] in uint8, for TensorBoard only."""
        if self.board is not None:
            array = np.asarray(array)
            self._tell_board(
                "write_images", step, {name: array if array.ndim == 4 else array[None]}
            )

    def note(self, text: str) -> None:
        """Print lines above the bar, and log them."""
        if not self.enabled:
            return
        self._log(text)
        if self.bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Report the last step and close the files. A second call does nothing."""
        if not self.files:
            return
        try:
            if self.pending is not None:
                self._report(*self.pending)
                self.pending = None
        finally:
            if self.bar is not None:
                self.bar.close()
            self._tell_board("close")
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
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._write("metrics.jsonl", json.dumps(row))
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
        self._tell_board("write_scalars", step, values)

    def _log(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        for line in text.splitlines():
            self._write("train.log", f"{stamp}  {line}")

    def _write(self, name: str, line: str) -> None:
        try:
            self.files[name].write(line + "\n")
            self.files[name].flush()  # a killed run leaves whole lines
        except OSError as error:
            raise _stopped(self.workdir / name, error) from error

    def _start_board(self) -> None:
        try:
            import tensorflow  # clu's writers need it; seconds to import, so only here

            tensorflow.config.set_visible_devices([], "GPU")  # or it takes the memory
            from clu.metric_writers import SummaryWriter

            self.board = SummaryWriter(str(self.workdir / TENSORBOARD))
        except ImportError as error:
            self._log(f"TensorBoard is not written: {error} (pip install 'gadjax[tensorboard]')")

    def _tell_board(self, method: str, *args: Any) -> None:
        """A fault of TensorBoard's is noted once and ends it, not the run."""
        board, self.board = self.board, None
        if board is None:
            return
        try:
            getattr(board, method)(*args)
        except Exception as error:
            self.note(f"TensorBoard stopped: {type(error).__name__}: {error}")
        else:
            self.board = None if method == "close" else board


def overview(params: Params) -> str:
    """A table of every parameter's path, shape, size and dtype, and their total."""
    from clu import parameter_overview

    return parameter_overview.get_parameter_overview(params, include_stats=False)


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a line that a killed run left unfinished."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if (done := _step(line)) is not None and done <= step]
    if kept != lines:
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(path)


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _stopped(path: Path, error: OSError) -> RunStopped:
    return RunStopped(f"{path}: cannot be written: {error.strerror or error}")
