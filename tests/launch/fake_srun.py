"""Stand-in for srun: real processes on this machine, with the variables of SLURM tasks.

    fake_srun.py [--ntasks=N] [--ntasks-per-node=N] [--kill-on-bad-exit=1] [...] COMMAND...

JAX's own detection of SLURM connects them over 127.0.0.1. Other options are ignored.
TERM to this process goes to every process of every task, as SLURM signals a step.
FAKE_SRUN_PID names a file for this process's number. SLURM_JOB_ID chooses JAX's port: take it from
`free_job_id`. Returns the highest code of the tasks, 128 + number for one that a signal ended.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

PORTS = range(61440, 65536)  # of these JAX takes number job modulo 4096


def free_job_id() -> int:
    """A job whose port is free."""
    for port in PORTS:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return 4096 + port - PORTS.start
    raise OSError("found no free port that SLURM's jobs have")


def parse(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options (--name=value or --name) and the command after them."""
    options = {}
    for i, argument in enumerate(arguments):
        if not argument.startswith("--"):
            return options, arguments[i:]
        name, _, value = argument[2:].partition("=")
        options[name] = value
    raise SystemExit("fake_srun: found no command")


def start(options: dict[str, str], command: list[str]) -> list[subprocess.Popen]:
    count = int(options.get("ntasks", os.environ.get("SLURM_NTASKS", "1")))
    here = int(options.get("ntasks-per-node", count))
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_NODES": str(-(-count // here)),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_TASKS_PER_NODE": str(here),
        "SLURM_NTASKS": str(count),
    }
    tasks = []
    for number in range(count):
        who = {
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number % here),
            "SLURM_NODEID": str(number // here),
        }
        tasks.append(subprocess.Popen(command, env=os.environ | step | who))
    return tasks


def send_signal(tasks: list[subprocess.Popen], kind: signal.Signals) -> None:
    """Signal every process of the tasks."""
    for task in tasks:
        try:
            top = psutil.Process(task.pid)
            for process in [top, *top.children(recursive=True)]:
                process.send_signal(kind)
        except psutil.NoSuchProcess:
            pass


def main(arguments: list[str]) -> int:
    options, command = parse(arguments)
    tasks = start(options, command)
    signal.signal(signal.SIGTERM, lambda number, frame: send_signal(tasks, signal.SIGTERM))
    if place := os.environ.get("FAKE_SRUN_PID"):
        Path(place).write_text(str(os.getpid()))
    strict = options.get("kill-on-bad-exit") == "1"
    while None in [task.poll() for task in tasks]:
        if strict and any(task.returncode for task in tasks):
            send_signal([task for task in tasks if task.returncode is None], signal.SIGKILL)
        time.sleep(0.05)
    return max(code if code >= 0 else 128 - code for code in (t.returncode for t in tasks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
