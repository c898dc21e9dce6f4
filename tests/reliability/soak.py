"""One long run of tiny steps with saves, previews and other commands that read its workdir: does it
need more and more memory, files, threads or time?

    python tests/reliability/soak.py [--count 20000] [--out docs/results/reliability]
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from figures import write_figures
from real_runs import make_config, names, rows, start, tail

from gadjax.runtime.status import read_status

MIB = 2**20
SAVES = 40  # and as many previews
LINES = 1000  # of metrics.jsonl
COMMANDS = "sample", "export", "evaluate", "status"  # in turn, each after 1 / PARTS of the steps
PARTS = 20


class Sample(NamedTuple):
    """The training process at one moment. rss: bytes."""

    step: int
    rss: int
    files: int
    threads: int


def soak(folder: Path, steps: int, pause: float = 2.0) -> dict[str, Any]:
    """Train below `folder` and look every `pause` seconds, with other commands beside it.

    Returns: figures; the second tenth is the first without a start-up in it. Raises: RuntimeError
    where the run or a command fails.
    """
    config, workdir, cache = make_config(folder), folder / "run", folder / "cache"
    every, lines = max(1, steps // SAVES), max(1, steps // LINES)
    process = start(
        cache,
        folder / "run.log",
        *(
            "train",
            "--config",
            f"{config}:regression",
            "--config.batch=2",
            "--workdir",
            workdir,
            f"--config.steps={steps}",
        ),
        *(f"--config.checkpoint.every={every}", f"--config.preview.every={every}"),
        f"--config.log.every={lines}",
        *("--config.optim.lr=1e-6", "--config.critic.lr=1e-6"),  # finite for so many steps
    )
    samples, kinds, ran = [], itertools.cycle(COMMANDS), Counter()
    command: subprocess.Popen | None = None
    try:
        measured, part = psutil.Process(process.pid), 1
        while process.poll() is None:
            if (workdir / "config.json").exists():
                step = read_status(workdir)["step"]
                with measured.oneshot():
                    counts = measured.num_fds(), measured.num_threads()
                    samples.append(Sample(step, measured.memory_info().rss, *counts))
                if command is None and step >= part * steps / PARTS:
                    kind, part = next(kinds), part + 1
                    command = _command(kind, folder, config)
                elif command is not None and command.poll() is not None:
                    _check(kind, command, folder / f"{kind}.log")
                    ran[kind], command = ran[kind] + 1, None
                    print(f"{kind} at {samples[-1]}", flush=True)
            time.sleep(pause)
    except psutil.Error:
        process.wait()  # it ended between two looks
    finally:
        if process.poll() is None:
            process.kill()
        if command is not None:
            command.wait()
    _check("train", process, folder / "run.log")
    saved = {"saves": steps // every, "previews": len(names(workdir / "previews"))}
    saved["commands"] = ran.total()
    figures = {"steps": steps, **saved, **{f"ran_{kind}": ran[kind] for kind in COMMANDS}}
    return figures | _growth(samples, workdir, steps)


def _command(kind: str, folder: Path, config: Path) -> subprocess.Popen:
    run, out = folder / "run", folder / kind
    prompts = ("--prompts", config.with_name("prompts.txt"), "--out", out, "--overwrite")
    few = ("--seeds", 2, "--library", 0, "--moves", 0, "--teacher-steps", 2)
    arguments = {
        "evaluate": ("--teacher", folder / "tiny", "--student", run, *prompts, *few),
        "sample": ("--model", run, *prompts),
        "export": ("--workdir", run, "--out", out, "--overwrite"),
        "status": (run, "--json"),
    }
    return start(folder / "cache", folder / f"{kind}.log", kind, *arguments[kind])


def _check(kind: str, process: subprocess.Popen, log: Path) -> None:
    if process.wait():
        raise RuntimeError(f"gadjax {kind}: exit {process.returncode}: {tail(log)}")


def _growth(samples: list[Sample], workdir: Path, steps: int) -> dict[str, Any]:
    """Over the second tenth of the steps and over the last: medians, and the fewest files and
    threads, of which a save in flight has more."""
    found = {"samples": len(samples)}
    logged = rows(workdir)
    for name, tenth in (("second_tenth", 1), ("last_tenth", 9)):
        low, high = tenth * steps / 10, (tenth + 1) * steps / 10
        here = [sample for sample in samples if low <= sample.step < high]  # not as it ends
        times = [
            (later["time"] - row["time"]) / (later["step"] - row["step"])
            for row, later in itertools.pairwise(logged)
            if low <= row["step"] < high
        ]
        found |= {
            f"rss_mib_{name}": round(statistics.median(s.rss for s in here) / MIB, 1),
            f"files_{name}": min(s.files for s in here),
            f"threads_{name}": min(s.threads for s in here),
            f"step_ms_{name}": round(1e3 * statistics.median(times), 2),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=20000, help="steps")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began, folder = time.time(), Path(tempfile.mkdtemp(prefix="gadjax-soak-"))
    figures = soak(folder, args.count)
    if args.out:
        print(write_figures("soak", args.out, began, figures))
    print(json.dumps(figures, indent=2))
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
