"""Harness for launch scripts: a closed PATH with a few tools, and programs that record calls."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASH = shutil.which("bash")
TOOLS = "bash cat dirname mkdir realpath rm setsid sleep tee tr".split()


class Bench:
    """Folder whose bin/ is the whole PATH; `calls` has the calls of the recording programs."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.record = folder, folder / "bin", folder / "record"
        self.bin.mkdir()
        self.logs = folder / "logs"
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))

    def program(self, name: str, *lines: str) -> None:
        """Write a bash program that records its arguments and then runs `lines`."""
        note = f'printf \'%s\\0\' $(($# + 1)) "${{0##*/}}" "$@" >> {self.record}'
        path = self.bin / name
        path.write_text("\n".join([f"#!{BASH}", note, *lines]) + "\n")
        path.chmod(0o755)

    def programs(self, *names: str, code: int = 0) -> None:
        for name in names:
            self.program(name, f"echo {name} says", f"exit {code}")

    def real_srun(self) -> None:
        """Make srun the one of fake_srun.py: tasks are processes of this machine."""
        fake = Path(__file__).with_name("fake_srun.py")
        self.program("srun", f'exec {sys.executable} {fake} "$@"')

    @property
    def calls(self) -> list[list[str]]:
        words = self.record.read_text().split("\0")[:-1] if self.record.exists() else []
        calls = []
        while words:
            count = int(words[0])
            calls.append(words[1 : count + 1])
            words = words[count + 1 :]
        return calls

    def environment(self, **variables) -> dict[str, str]:
        base = {"PATH": str(self.bin), "HOME": str(self.folder), "LOGS": str(self.logs)}
        return base | {key: str(value) for key, value in variables.items()}

    def start(self, script: str, *arguments, **variables) -> subprocess.Popen:
        return subprocess.Popen(
            [BASH, ROOT / "launch" / script, *arguments],
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            start_new_session=True,
        )

    def run(self, script: str, *arguments, code: int = 0, **variables) -> tuple[str, str]:
        """Run a script; return its stdout and stderr; fail unless it returns `code`."""
        process = self.start(script, *arguments, **variables)
        try:
            out, err = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == code, (process.returncode, out, err)
        return out, err


HOSTILE = "--config.data.prompts=a b; rm -rf /"
GKE = {
    "PROJECT": "lab",
    "ZONE": "us-east5-b",
    "CLUSTER": "pods",
    "TPU_TYPE": "v5litepod-16",
    "NUM_SLICES": 2,
    "IMAGE": "registry/gadjax@sha256:0",
    "NAME": "pixart-1",
    "WORKDIR": "gs://bucket/runs/pixart",
    "CONFIG": "configs/pixart_gad.py:tdm",
}
VM = {key: GKE[key] for key in ("PROJECT", "ZONE", "NAME", "WORKDIR", "CONFIG")}
VM |= {"TPU_TYPE": "v6e-16"}
JOB = {"SLURM_NTASKS": 16, "SLURM_NTASKS_PER_NODE": 8, "SLURM_GPUS_ON_NODE": 8}
JOB |= {"CONFIG": "configs/pixart_gad.py"}


def train(workdir, devices, *extra) -> list[str]:
    flags = ["--config", "configs/pixart_gad.py", "--workdir", str(workdir)]
    return ["train", *flags, "--devices", str(devices), *extra]


def without(variables: dict, *keys) -> dict:
    return {key: value for key, value in variables.items() if key not in keys}


def status(workdir: Path, word: str, at: float = 0) -> None:
    workdir.mkdir(exist_ok=True)
    (workdir / "status.json").write_text(json.dumps(status_record(word, at)))


def status_record(word: str, at: float = 0) -> dict:
    reason = 'it said "status": "done"' if word == "stopped" else ""
    record = {"reason": reason, "status": word, "step": 3, "steps": 9, "time": at}
    return record | {"text": word}


LOOP = "for ((i = 0; i < 600; i++)); do sleep 0.05; done"  # of a program that waits for a signal


def wait_for(what, seconds: float = 20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


CHANGES = [  # status.json before and after (word, time), the exit codes of run and pod
    (None, ("done", 1), 0, 0),
    (None, ("preempted", 1), 0, 143),
    (("preempted", 1), ("preempted", 1), 0, 143),  # stopped before it began
    (("preempted", 1), ("preempted", 1), 1, 1),  # failed before it began: it would again
    (None, ("running", 1), 137, 143),
    (("running", 1), ("running", 2), 3, 143),  # a peer was lost
    (("running", 1), ("running", 1), 137, 137),
    (None, ("stopped", 1), 3, 3),
    (None, ("stopped", 1), 137, 3),
    (("running", 1), ("running", 2), 2, 2),
    (None, None, 127, 127),
]


def put_status(bench, workdir, before, after, code) -> None:
    """Make gadjax a run that writes the status `after` and returns `code`."""
    if before:
        status(workdir, *before)
    text = shlex.quote(json.dumps(status_record(*after))) if after else ""
    write = f"mkdir -p {workdir}; printf %s {text} > {workdir}/status.json" if after else ":"
    bench.program("gadjax", write, f"exit {code}")
