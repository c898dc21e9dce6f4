"""Real runs whose disk fills up, turns read-only, or goes away; needs root, for mounts of its own.

    python tests/reliability/disk.py [--count 1] [--out docs/results/reliability]

Whatever happens, a run has to end with one line and exit code 3 or to go on, as
`checkpoint.failures` says; the steps that it saved stay sound, and the same command, once the disk
is as it was, ends with the bits of a run that nothing disturbed.
"""

import argparse
import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from figures import write_figures
from real_runs import (
    make_config,
    names,
    rows,
    sound,
    start,
    state_of,
    tail,
)

STEPS, EVERY, BORNE = 400, 20, 100
ROOM = 16 << 20  # bytes of a disk of its own; a checkpoint of the tiny run has less than one
LIMIT = 900  # seconds until what does not come is a failure


class Failure(Exception):
    """Something that a disk must not do to a run."""


class Disk:
    """A file system of its own, in memory, that can be made to fail."""

    def __init__(self, mount: Path):
        self.mount, self.aside = mount, mount.with_name("aside")

    def __enter__(self) -> "Disk":
        self.mount.mkdir(parents=True)
        self.aside.mkdir()
        _call("mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", self.mount)
        return self

    def __exit__(self, *error: object) -> None:
        for folder in (self.mount, self.mount, self.aside):
            _works("umount", "-l", folder)

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.mount / "ballast").open("ab", 0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self.mount / "ballast").unlink()

    def lock(self) -> None:
        """Read-only for whoever opens a file from now on."""
        _call("mount", "--bind", self.mount, self.mount)
        _call("mount", "-o", "remount,ro,bind", self.mount)

    def unlock(self) -> None:
        _call("umount", "-l", self.mount)

    def leave(self) -> None:
        """Gone from its place, where an empty folder is left; what is open there stays open."""
        _call("mount", "--bind", self.mount, self.aside)
        _call("umount", "-l", self.mount)

    def come_back(self) -> None:
        if found := names(self.mount):
            raise Failure(f"wrote {found} beneath the mount that was gone")
        _call("mount", "--bind", self.aside, self.mount)
        _call("umount", "-l", self.aside)


# What happens to a disk, and how it is undone.
ACCIDENTS = {
    "full": (Disk.fill, Disk.free),
    "read_only": (Disk.lock, Disk.unlock),
    "gone": (Disk.leave, Disk.come_back),
}


def _works(*command: object) -> bool:
    return not subprocess.run([str(part) for part in command], capture_output=True).returncode


def _call(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return _works("mount", "-t", "tmpfs", "tmpfs", folder) and _works("umount", folder)


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed, for others to be compared with."""

    config: Path
    folder: Path
    steps: int = STEPS

    def begin(self, workdir: Path, log: Path, failures: int = 0) -> subprocess.Popen:
        return start(
            self.folder / "cache",
            log,
            *("train", "--config", f"{self.config}:tdm", "--workdir", workdir),
            f"--config.steps={self.steps}",
            f"--config.checkpoint.every={EVERY}",
            f"--config.checkpoint.failures={failures}",
        )

    def run(self) -> "Reference":
        log = self.folder / "whole.log"
        if _end(self.begin(self.folder / "whole", log)):
            raise Failure(tail(log))
        return self

    def compare(self, workdir: Path) -> None:
        steps = [row["step"] for row in rows(workdir)]
        if steps != list(range(1, self.steps + 1)):
            raise Failure(f"metrics.jsonl has {len(steps)} rows, the last of {steps[-1:]}")
        if max(sound(workdir)) != self.steps or state_of(workdir) != self.state:
            raise Failure("ended with another state than an undisturbed run")

    @cached_property
    def state(self) -> str:
        return state_of(self.folder / "whole")


def saved(workdir: Path) -> set[str]:
    """Steps that are in place."""
    return {name for name in names(workdir / "checkpoints") if name.isdecimal()}


def try_accident(reference: Reference, folder: Path, accident: str, failures: int) -> str:
    """One run that is disturbed. failures: that it tolerates; where it tolerates none it is started
    again after the disk is as it was. Returns the line that it logged. Raises: Failure."""
    happen, undo = ACCIDENTS[accident]
    folder.mkdir()
    log = folder / "log"
    with Disk(folder / "disk") as disk:
        workdir = disk.mount / "run"
        process = reference.begin(workdir, log, failures)
        try:
            _wait_for(lambda: len(saved(workdir)) > 1, process, log)
            happen(disk)
            before = saved(workdir) if accident != "gone" else saved(disk.aside / "run")
            if failures:
                _wait_for(lambda: "(failure 1 of " in log.read_text(), process, log)
            elif _end(process) != 3:
                raise Failure(f"ended with {process.returncode}: {tail(log)}")
            undo(disk)
            text = log.read_text()
            reported = [line for line in text.splitlines() if "cannot be written" in line]
            if "Traceback" in text or not reported:
                raise Failure(f"logged {tail(log)}")
            if not failures:
                if len(reported) > 1 or text.splitlines()[-1] != reported[0]:
                    raise Failure(f"logged {reported}")
                if lost := before - {str(step) for step in sound(workdir)}:
                    raise Failure(f"lost steps {sorted(lost)}")
                if any("tmp" in name for name in names(workdir / "checkpoints")):
                    raise Failure(f"left {names(workdir / 'checkpoints')}")
                process = reference.begin(workdir, log)
            if _end(process):
                raise Failure(f"did not go on: {tail(log)}")
            reference.compare(workdir)
            return next(line for line in reported if "stopped" in line or "(failure 1" in line)
        finally:
            process.kill()
            process.wait()


def _end(process: subprocess.Popen) -> int:
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _wait_for(there: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not there():
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failure(f"{process.returncode} too early or nothing for too long: {tail(log)}")
        time.sleep(0.005)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1, help="times that each accident happens")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not can_mount():
        raise SystemExit("disk.py: found no right to mount a tmpfs; expected root")
    began, folder = time.time(), Path(tempfile.mkdtemp(prefix="gadjax-disk-"))
    reference = Reference(make_config(folder), folder).run()
    failed, lines, runs = [], {}, 0
    for number in range(args.count):
        for accident in ACCIDENTS:
            for failures in (0, BORNE):
                name = f"{accident}_{'borne' if failures else 'stopped'}"
                try:
                    line = try_accident(reference, folder / f"{name}-{number}", accident, failures)
                except Failure as error:
                    failed.append(line := f"{name}: {error}")
                lines[f"{name}_said"] = line.replace(str(folder), "").strip()
                runs += 1
                print(f"{name}: {line}", flush=True)
    figures = {"runs": runs, "not_as_they_must_be": len(failed), "failures": "; ".join(failed)}
    if args.out:
        print(write_figures("disk", args.out, began, figures | lines))
    if not failed:
        shutil.rmtree(folder)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
