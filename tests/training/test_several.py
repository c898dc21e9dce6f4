"""Two processes of one run: results of one process, loss of a peer, preemption, resuming."""

import json
import signal
import time

import numpy as np
import pytest
from several import start
from train_runs import losses, read_vector

from gadjax.checkpoints.restore import read_params
from gadjax.runtime.supervisor import free_port

pytestmark = pytest.mark.slow  # compiles the updates for eight devices
PARTS = "student", "critic", "ema"
MESH = "--config.mesh.data=2", "--config.mesh.fsdp=4"


@pytest.fixture(scope="session")
def run(config):
    """(workdir, count, steps, mesh) -> the processes of a run on eight devices in all."""

    def begin(workdir, count, *more, mesh=MESH, devices=8):
        command = ["-m", "gadjax", "train", "--config", f"{config}:tdm", "--workdir", str(workdir)]
        command += [f"--devices={devices}", *mesh, *more]
        port = free_port()
        return [
            start(command, i, count, port, devices // count, GADJAX_PEER_TIMEOUT="10")
            for i in range(count)
        ]

    return begin


def end(processes, timeout=400) -> list[int]:
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    codes = [process.returncode for process in processes]
    print(*outputs, sep="\n")
    return codes


@pytest.fixture(scope="session")
def two(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("several") / "two"
    assert end(run(workdir, 2, "--config.preview.every=4")) == [0, 0]
    return workdir


def test_one_process_writes_logs_and_previews(two):
    assert [path.name for path in sorted((two / "previews").iterdir())] == [
        "0000000.png",
        "0000004.png",
    ]
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    assert (two / "train.log").read_text().count("step 4/4") == 1


def test_two_processes_do_what_one_does(run, two, tmp_path):
    assert end(run(tmp_path / "one", 1)) == [0]
    actual, expected = losses(two), losses(tmp_path / "one")
    assert actual.keys() == expected.keys() == {1, 2, 3, 4}
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=1e-5)
    # Sums in another order: Adam turns rounding into steps where a gradient is all rounding.
    for part in PARTS:
        change = read_vector(tmp_path / "one", part) - read_vector(tmp_path / "one", part, 2)
        apart = read_vector(tmp_path / "one", part) - read_vector(two, part)
        assert np.linalg.norm(apart) < 0.02 * np.linalg.norm(change)


def wait_for(there, processes, timeout=300):
    deadline = time.monotonic() + timeout
    while not there():
        assert all(p.poll() is None for p in processes) and time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_process_ends_the_other_and_both_resume_bit_identically(run, two, tmp_path):
    workdir = tmp_path / "killed"
    processes = run(workdir, 2, "--config.steps=4000")
    wait_for((workdir / "checkpoints" / "2").exists, processes)
    processes[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    codes = end(processes)
    assert codes == [-signal.SIGABRT, -signal.SIGKILL] and time.monotonic() - begin < 60
    # Not "stopped", so that launchers start it again.
    assert json.loads((workdir / "status.json").read_text())["text"] == "running"
    newest = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    goal = f"--config.steps={newest + 2}"
    assert end(run(workdir, 2, goal)) == [0, 0]
    assert end(run(tmp_path / "whole", 2, goal)) == [0, 0]
    for part in PARTS:
        np.testing.assert_array_equal(
            read_vector(workdir, part), read_vector(tmp_path / "whole", part)
        )


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1])
def test_both_save_and_exit_when_one_is_preempted(run, two, tmp_path, kind):
    workdir = tmp_path / "told"
    processes = run(workdir, 2, "--config.steps=4000", "--config.checkpoint.every=1000")
    wait_for(lambda: len(losses(workdir)) > 1, processes)  # all have compiled
    processes[1].send_signal(kind)
    last_step, begin = max(losses(workdir)), time.monotonic()
    assert end(processes) == [0, 0]
    print(f"{kind.name}: left {time.monotonic() - begin:.1f} s later")
    # Its row is reported one step late, and they leave after the step that none has begun.
    status = json.loads((workdir / "status.json").read_text())
    assert status["text"] == f"preempted at step {status['step']}"
    assert read_params(workdir / "checkpoints", "ema")[0] == status["step"] <= last_step + 3


# Processes, devices and mesh that go on with what two processes of eight devices began.
OTHERS = {
    "8": (1, 8, MESH),
    "4": (1, 4, ("--config.mesh.data=1", "--config.mesh.fsdp=4")),
    "1": (1, 1, ("--config.mesh.data=1", "--config.mesh.fsdp=1")),
    "2 x 4": (2, 8, ("--config.mesh.data=4", "--config.mesh.fsdp=2")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_meshes_resume_with_the_same_prompts_and_noises(run, two, tmp_path, name):
    count, devices, mesh = OTHERS[name]
    workdir = tmp_path / "moved"
    assert end(run(workdir, 2, "--config.steps=2")) == [0, 0]
    assert end(run(workdir, count, mesh=mesh, devices=devices)) == [0] * count
    actual, expected = losses(workdir), losses(two)
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=1e-4)


def test_two_runs_in_one_workdir(run, two, tmp_path):
    workdir = tmp_path / "shared"
    first = run(workdir, 2, "--config.steps=4000")
    wait_for((workdir / "run.json").exists, first)
    second = run(workdir, 1, "--config.steps=4000")
    output = second[0].communicate(timeout=300)[0]
    assert second[0].returncode == 2 and "another run that writes to it" in output
    for process in first:
        process.send_signal(signal.SIGTERM)
    assert end(first) == [0, 0]
