"""Full runs of `gadjax train`: resuming, being killed, failing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from several import flags_for
from train_runs import losses, read_vector, rows, train

from gadjax.checkpoints.restore import read_params
from gadjax.cli.main import main

ROOT = Path(__file__).parents[2]


def command(config: Path, workdir: Path, *more: str, devices: int = 1) -> subprocess.Popen:
    """`gadjax train` in a separate process."""
    environment = os.environ | {"XLA_FLAGS": flags_for(devices)}
    arguments = ["train", "--config", str(config), "--workdir", str(workdir), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "gadjax", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


PARTS = ("student", "critic", "ema")


def assert_same(one: Path, other: Path):
    for part in PARTS:
        np.testing.assert_array_equal(read_vector(one, part), read_vector(other, part))


@pytest.fixture(scope="session")
def uninterrupted(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(config, workdir) == 0
    return workdir


def test_files_of_a_run(uninterrupted):
    lines = rows(uninterrupted)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for name in ("loss/dmd", "loss/gad", "loss/anchor", "gad/cosine", "critic/loss"):
        assert np.isfinite(lines[-1][name])
    status = json.loads((uninterrupted / "status.json").read_text())
    assert (status["text"], status["step"], status["steps"]) == ("done", 4, 4)
    assert json.loads((uninterrupted / "config.json").read_text())["student"]["steps"] == 2


def test_both_updates_are_compiled_once_and_in_threads(config, tmp_path):
    """jit takes what the threads have compiled: the calls compile nothing."""
    compiled = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration" and "_step" in fun_name:
            compiled.append((fun_name, threading.current_thread() is threading.main_thread()))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert train(config, tmp_path / "run", "--config.steps=2") == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert sorted(compiled) == [("jit(critic_step)", False), ("jit(student_step)", False)]


def test_status_of_a_finished_run(uninterrupted, capsys):
    assert main(["status", str(uninterrupted), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["state"] == "done" and report["step"] == report["checkpoint"]["step"] == 4
    assert (
        report["devices"] == 1 and report["utilisation"] is None
    )  # of a CPU nobody knows the peak
    run = json.loads((uninterrupted / "run.json").read_text())
    assert run["flops_per_step"] > 1e6 and run["versions"]["jax"] == jax.__version__
    assert run["environment"]["XLA_FLAGS"] == os.environ["XLA_FLAGS"]
    seconds = report["seconds"]
    assert all(seconds[kind] > 0 for kind in ("compile", "step", "data", "checkpoint"))
    assert seconds["lost"] == seconds["preview"] == 0
    lines = rows(uninterrupted)
    since = seconds["step"] + seconds["data"] + seconds["checkpoint"]
    assert lines[-1]["time"] - lines[0]["time"] < since < sum(seconds.values())


def test_resume_is_bit_identical(config, uninterrupted, tmp_path):
    workdir = tmp_path / "halves"
    assert train(config, workdir, "--config.steps=2") == 0
    assert train(config, workdir) == 0
    assert_same(workdir, uninterrupted)


@pytest.mark.slow
def test_other_prompts_under_the_same_name_are_refused(config, tmp_path, capsys):
    """Also by --reproduce-step; a workdir that was begun without fingerprints goes on."""
    prompts, workdir = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("red circle\ngreen square\n")
    more = [f"--config.data.prompts={prompts}"]
    assert train(f"{config}:regression", workdir, *more, "--config.steps=1") == 0
    prompts.write_text("\ufeffred circle\r\n\r\ngreen square")  # the same ones
    assert train(f"{config}:regression", workdir, *more, "--config.steps=1") == 0
    prompts.write_text("green square\nred circle\n")
    capsys.readouterr()
    for again in ("--config.steps=2", "--reproduce-step=1"):
        assert train(f"{config}:regression", workdir, *more, again) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and f"data.prompts {prompts}: found other contents" in line
    (workdir / "inputs.json").unlink()
    assert train(f"{config}:regression", workdir, *more, "--config.steps=2") == 0
    assert "data.prompts" in json.loads((workdir / "inputs.json").read_text())


def test_a_finished_run_is_reported_and_unchanged(config, uninterrupted, tmp_path):
    before = (uninterrupted / "checkpoints" / "4" / "manifest.json").stat().st_mtime_ns
    assert train(config, uninterrupted) == 0
    assert (uninterrupted / "checkpoints" / "4" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_killed_process_resumes_bit_identically(config, uninterrupted, tmp_path):
    workdir = tmp_path / "killed"
    # Long enough to be still running when it is killed after its first checkpoint.
    process = command(config, workdir, "--config.steps=4000")
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / "2").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    goal = steps + 2
    assert train(config, workdir, f"--config.steps={goal}") == 0
    straight = tmp_path / "whole"
    assert train(config, straight, f"--config.steps={goal}") == 0
    assert_same(workdir, straight)


@pytest.mark.slow
def test_a_profile_of_a_few_steps(config, tmp_path):
    # In a process of its own: where a test has loaded libtpu, JAX's profiler ends the process.
    process = command(config, tmp_path / "run", "--profile=2:1")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "profile of steps 3 to 3" in output, output
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def running(config, workdir) -> subprocess.Popen:
    """A long run, after its first step."""
    process = command(config, workdir, "--config.steps=4000", "--config.checkpoint.every=1000")
    deadline = time.monotonic() + 240
    while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_exits_with_zero(config, tmp_path, kind):
    workdir = tmp_path / "asked"
    process = running(config, workdir)
    process.send_signal(kind)
    begin = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and time.monotonic() - begin < 10, output
    status = json.loads((workdir / "status.json").read_text())
    assert status["text"] == f"preempted at step {status['step']}"
    assert read_params(workdir / "checkpoints", "ema")[0] == status["step"]


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.0, 0.1, 0.3])
def test_a_second_signal_corrupts_nothing(config, tmp_path, wait):
    """It may come before, while or after the first one's checkpoint is written."""
    workdir = tmp_path / "asked twice"
    process = running(config, workdir)
    process.send_signal(signal.SIGTERM)
    time.sleep(wait)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGTERM)
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    goal = f"--config.steps={max(steps, default=0) + 2}"
    assert train(config, workdir, goal) == 0
    assert train(config, tmp_path / "whole", goal) == 0
    assert_same(workdir, tmp_path / "whole")


@pytest.mark.slow
def test_another_mesh_continues(config, uninterrupted, tmp_path):
    """One device for two steps, then eight: the same prompts and noises, the same result."""
    workdir = tmp_path / "moved"
    assert train(config, workdir, "--config.steps=2") == 0
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    process = command(config, workdir, *mesh, devices=8)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    # Adam divides every gradient by its own size, so that where one is all rounding two meshes may
    # move apart; over all parameters that is little of the way they went. With other prompts or
    # noises the ways would have nothing in common.
    for part in PARTS:
        change = read_vector(uninterrupted, part, 4) - read_vector(uninterrupted, part, 2)
        apart = read_vector(workdir, part, 4) - read_vector(uninterrupted, part, 4)
        assert np.linalg.norm(apart) < 0.02 * np.linalg.norm(change)
    actual, expected = ([*losses(w).values()] for w in (workdir, uninterrupted))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_another_config_is_refused_key_by_key(config, uninterrupted, capsys):
    assert train(config, uninterrupted, "--config.optim.lr=0.5", "--config.seed=3") == 2
    line = capsys.readouterr().err
    assert "optim.lr" in line and "seed" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--config.optim.lrr=1", "lr"),
        ("--config.batch=many", "batch"),
        ("--config.teacher=/nowhere", "/nowhere"),
        ("--config.data.prompts=/nowhere.txt", "/nowhere.txt"),
        ("--config.student.steps=3", "student.steps"),
        ("--config.microbatch=3", "microbatch"),
        ("--config.mesh.data=2", "mesh"),
        ("--config.dtype=int8", "dtype"),
        ("--config.student.timesteps=(1500, 400)", "student.timesteps"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(config, tmp_path, capsys, change, words):
    assert train(config, tmp_path / "run", change) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_is_refused(config, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    assert train(config, tmp_path) == 2
    assert "config.json" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.slow
def test_non_finite_updates_stop_the_run_and_reach_no_checkpoint(config, tmp_path, capsys):
    # An infinite weight makes every loss infinite from the first step on.
    assert train(config, tmp_path / "run", "--config.guidance=1e38", "--config.steps=9") == 3
    assert "not finite" in capsys.readouterr().err
    for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*"):
        _, params, _ = read_params(path.parent, "student", int(path.name))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
