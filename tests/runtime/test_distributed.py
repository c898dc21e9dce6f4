"""Several real processes on one machine: initialization, consistency checks, joint preemption."""

import signal
import threading

import pytest
from several import start

from gadjax.errors import InputError
from gadjax.runtime import distributed
from gadjax.runtime.supervisor import free_port

WORKER = """
import os, signal, sys
from pathlib import Path
from gadjax.errors import InputError, RunStopped
from gadjax.runtime import distributed
from gadjax.runtime.distributed import (
    PreemptionHandler,
    check_devices,
    check_same_on_all,
    initialize_distributed,
    run_on_all_processes,
)

initialize_distributed()
import jax
number = jax.process_index()

def show(name, f):
    try:
        print(f"{name}: {f()}", flush=True)
    except (InputError, RunStopped) as error:
        print(f"{name}: {type(error).__name__}: {error}", flush=True)

def fail():
    if number == 1:
        raise RunStopped("no room")
    return "fine"

show("devices", lambda: (jax.device_count(), jax.local_device_count()))
show("count", lambda: check_devices(16))
show("same", lambda: check_same_on_all({"lr": 1}, Path("run")))
show("config", lambda: check_same_on_all({"lr": number}, Path("run")))
show("workdir", lambda: check_same_on_all({"lr": 1}, Path(f"run{number}")))
distributed._source_code = lambda: f"print({number})"
show("code", lambda: check_same_on_all({"lr": 1}, Path("run")))
show("all", lambda: run_on_all_processes(lambda: "fine"))
show("one", lambda: run_on_all_processes(fail))
with PreemptionHandler() as preemption:
    for step in range(1, 10_000):
        if step == 5 and number == 1:  # this process alone gets the signal
            os.kill(os.getpid(), signal.SIGUSR1)
        # A collective operation, as in every training step, which keeps the processes in step.
        run_on_all_processes(lambda: None)
        if preemption.should_stop(step):
            break
print(f"left: {step}", flush=True)
"""


@pytest.fixture(scope="module")
def outputs():
    """Lines that both processes printed, by name."""
    port = free_port()
    both = [start(["-c", WORKER], number, 2, port, 4) for number in (0, 1)]
    printed = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    return [
        dict(line.split(": ", 1) for line in output.splitlines() if ": " in line)
        for output in printed
    ]


def test_processes_connect(outputs):
    assert [words["devices"] for words in outputs] == ["(8, 4)"] * 2


def test_an_unexpected_number_of_devices_is_an_error_on_all(outputs):
    for words in outputs:
        assert words["count"].startswith("InputError: --devices: found 8 in 2 processes; expected")


def test_equal_processes_pass_the_check(outputs):
    assert [words["same"] for words in outputs] == ["None"] * 2


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("config", "another config"),
        ("workdir", "another workdir"),
        ("code", "other code of gadjax"),
    ],
)
def test_processes_that_differ_all_end(outputs, name, what):
    for number, words in enumerate(outputs):
        assert words[name].startswith(
            f"InputError: process {1 - number}: found {what} than on process {number}"
        )


def test_an_error_on_one_ends_all_with_its_kind(outputs):
    assert [words["all"] for words in outputs] == ["fine"] * 2
    assert outputs[1]["one"] == "RunStopped: no room"
    assert outputs[0]["one"].startswith("RunStopped: process 1 ended")


def test_all_stop_after_the_same_step_whoever_got_the_signal(outputs):
    steps = [int(words["left"]) for words in outputs]
    assert steps[0] == steps[1] and 5 <= steps[0] < 9_999


LOSES = """
import jax
from gadjax.errors import RunStopped
from gadjax.runtime import distributed
distributed.is_single_process = lambda: False
for error in (RunStopped("no room"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory")):
    try:
        with distributed.abort_on_lost_peer():
            raise error
    except Exception as raised:
        print(raised is error, flush=True)
with distributed.abort_on_lost_peer():
    raise RunStopped("checkpoints/8: cannot be written") from RuntimeError("Gloo AllGather failed")
"""


def test_a_lost_peer_is_not_a_fault_of_this_run():
    process = start(["-c", LOSES], 0, 1, 0, 1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == -signal.SIGABRT
    assert output.splitlines()[:3] == [
        "True",
        "True",
        "gadjax: a peer was lost: Gloo AllGather failed",
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS: found nothing"),
        (
            {"JAX_NUM_PROCESSES": "two", "JAX_COORDINATOR_ADDRESS": "a:1"},
            "JAX_NUM_PROCESSES: found 'two'",
        ),
        (
            {
                "JAX_NUM_PROCESSES": "2",
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_PROCESS_ID": "2",
            },
            "JAX_PROCESS_ID: found 2; expected 0 to 1",
        ),
        ({"GADJAX_PEER_TIMEOUT": "soon"}, "GADJAX_PEER_TIMEOUT: found 'soon'"),
        (
            {
                "SLURM_LOCALID": "0",
                "SLURM_GPUS_ON_NODE": "8",
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            },
            "SLURM: found 1 tasks on a node of 8 GPUs",
        ),
    ],
)
def test_wrong_variables_are_named(monkeypatch, given, words):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        distributed.initialize_distributed()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_one_slurm_task_per_gpu_passes(monkeypatch):
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8(x2)")
    distributed._check_slurm()


def test_signals_are_left_to_the_main_thread():
    """A run in a worker thread cannot handle signals, and trains without."""
    before, stops = signal.getsignal(signal.SIGTERM), []

    def work():
        with distributed.PreemptionHandler() as preemption:
            stops.append(preemption.should_stop(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert stops == [False] and signal.getsignal(signal.SIGTERM) is before
