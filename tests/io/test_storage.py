"""Workdirs in an object store, tested against an in-memory server (`fake_gcs`)."""

import importlib.util
import json
import os
import sys
import time
import uuid
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_gcs import serve
from jax.sharding import SingleDeviceSharding
from programs import run_python
from train_runs import rows

from gadjax.checkpoints.checkpoint import Checkpoints
from gadjax.checkpoints.restore import read_params
from gadjax.cli.main import main
from gadjax.errors import InputError, RunStopped
from gadjax.io.manifest import verify
from gadjax.io.storage import as_path, check_access, list_objects, write_atomic
from gadjax.runtime import workdir_lock as claims
from gadjax.runtime.goodput import GoodputClock
from gadjax.runtime.profiler import Profile
from gadjax.runtime.progress import Progress
from gadjax.runtime.status import read_status
from gadjax.runtime.supervisor import _write_stopped_status
from gadjax.runtime.workdir_lock import WorkdirLock
from gadjax.training.config import default_config
from gadjax.training.state import create_state


@pytest.fixture(scope="module")
def server():
    """The (store, environment) of all tests: clients cache the store's address."""
    with serve() as (store, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        patch.setitem(sys.modules, "tensorflow", None)
        yield store, environment


@pytest.fixture
def store(server):
    store, _ = server
    yield store
    store.refuse = lambda request: None


@pytest.fixture
def workdir(store):
    return as_path(f"gs://bucket/runs/{uuid.uuid4().hex[:8]}")


def test_local_paths_and_unsupported_stores(tmp_path, monkeypatch):
    assert as_path(str(tmp_path)) == tmp_path and type(as_path("a/b")) is type(tmp_path)
    for text in ("s3://bucket/run", "http://x/y", "gs://"):
        with pytest.raises(InputError, match=r"--workdir: found \S*; expected a folder or gs://"):
            as_path(text)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs gcsfs; expected pip install 'gadjax\[gcs\]'"):
        as_path("gs://bucket/run")


def test_access_is_checked_before_any_work(store, workdir, tmp_path, capsys):
    check_access(workdir, write=True)
    with pytest.raises(InputError, match="gs://other/run: found nothing at .*; expected a bucket"):
        check_access(as_path("gs://other/run"))
    store.refuse = lambda request: 403
    config = tmp_path / "config.py"
    config.write_text("from gadjax.training.config import default_config as get_config\n")
    for command in (
        ["train", "--config", str(config), "--workdir", str(workdir)],
        ["status", str(workdir)],
        ["export", "--workdir", str(workdir), "--out", "never"],
    ):
        assert main(command) == 2
        line = capsys.readouterr().err
        assert f"{workdir}: found Forbidden" in line and line.count("\n") == 1


def make_state():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"student": {"kernel": jax.random.normal(keys[0], (64, 48))}}
    params["critic"] = {"kernel": jax.random.normal(keys[1], (8, 8)).astype(jnp.bfloat16)}
    return create_state(params, {role: optax.adam(0.1) for role in params})


def shapes(state):
    place = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def restore(folder, state):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(shapes(state))
    finally:
        checkpoints.close()


def test_checkpoints(store, workdir, caplog):
    folder, state = workdir / "checkpoints", make_state()
    root = str(folder).removeprefix("gs://bucket/")
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.restore(shapes(state)) is None
    for step in (2, 4, 6):
        checkpoints.save(step, state, {"seed": step})
    checkpoints.manager.wait_until_finished()
    assert {name.split("/")[0] for name in list_objects(folder)} == {"4", "6"}
    made = store.generations
    assert made[f"{root}/6/manifest.json"] < made[f"{root}/6/commit_success.txt"]
    assert verify(folder / "6") is None
    checkpoints.close()  # finalizes the manifest
    manifest = json.loads((folder / "6" / "manifest.json").read_text())
    assert manifest.keys() == list_objects(folder / "6").keys() and verify(folder / "6") is None
    for name in ("_CHECKPOINT_METADATA", "manifest.json", "stray"):
        before = store.objects.get(f"{root}/6/{name}", b"")
        store.put(f"{root}/6/{name}", before + b" ")
        assert name in verify(folder / "6")
        if before:
            store.put(f"{root}/6/{name}", before)
        else:
            store.remove(f"{root}/6/{name}")
    assert verify(folder / "6") is None

    step, same, meta = restore(folder, state)
    assert (step, meta) == (6, {"seed": 6})
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    step, params, _ = read_params(folder, "student")
    assert step == 6 and np.array_equal(params["kernel"], state.params["student"]["kernel"])

    # A save that was killed before its commit does not count, and does not block the next one.
    store.put(f"{root}/8/state/d/half", b"half")
    store.put(f"{root}/8/manifest.json", b"{}")
    assert read_params(folder)[0] == 6
    with pytest.raises(InputError, match="found 6, 4; expected 8"):
        read_params(folder, "ema", 8)

    name = max((n for n in made if f"{root}/6/" in n), key=lambda n: len(store.objects[n]))
    data = bytearray(store.objects[name])
    data[len(data) // 2] ^= 8
    store.put(name, data)
    assert "its checksum differs" in verify(folder / "6")
    checkpoints = Checkpoints(folder)
    assert checkpoints.restore(shapes(state))[0] == 4
    assert f"{folder}/6: damaged checkpoint skipped" in caplog.text
    assert "6/manifest.json" in list_objects(workdir / "damaged")
    for step in (6, 8):
        checkpoints.save(step, state, {"again": step})
    checkpoints.close()
    assert restore(folder, state)[2] == {"again": 8}
    assert "6/manifest.json" in list_objects(workdir / "damaged")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_refused_checkpoint_stops_the_run(store, workdir):
    folder, state = workdir / "checkpoints", make_state()
    checkpoints = Checkpoints(folder)
    checkpoints.save(2, state, {})
    checkpoints.wait()
    store.refuse = lambda request: 403 if request.startswith("POST") else None
    with pytest.raises(RunStopped, match="checkpoints/4: cannot be written: .*refused"):
        checkpoints.save(4, state, {})
        checkpoints.wait()
    store.refuse = lambda request: 403
    with pytest.raises(RunStopped, match="checkpoints: cannot be read: Forbidden"):
        read_params(folder)  # must not be taken for an empty folder
    store.refuse = lambda request: None
    assert restore(folder, state)[0] == 2


def test_workdir_lock(workdir, monkeypatch, caplog):
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(claims, "STALE_SECONDS", 1.5)
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.1)
    with WorkdirLock(workdir, 10) as claim:
        claim.write_status("running", 3)
        with pytest.raises(InputError, match="another run .*process [0-9]+ on .*one at a time"):
            WorkdirLock(workdir, 10)
    assert not (workdir / "lock").exists()
    assert json.loads((workdir / "status.json").read_text())["step"] == 3

    # Killed: the lock stays, and its lease is not renewed.
    dead = {"holder": "process 1 on earth", "time": time.time(), "token": "dead"}
    write_atomic(workdir / "lock", json.dumps(dead))
    began = time.monotonic()
    with WorkdirLock(workdir, 10) as claim:
        assert 1 < time.monotonic() - began < 10
        assert "found process 1 on earth; waiting" in caplog.text
    write_atomic(workdir / "lock", json.dumps(dead | {"time": time.time() - 60}))
    began = time.monotonic()
    with pytest.raises(RunStopped, match="another run that took it over"):
        with WorkdirLock(workdir, 10) as claim:
            assert time.monotonic() - began < 1
            write_atomic(workdir / "lock", json.dumps(dead))
            claim.lock.thread.join(5)
            claim.write_status("running", 4)
    assert json.loads((workdir / "lock").read_text()) == dead
    assert json.loads((workdir / "status.json").read_text())["step"] == 3


def test_unwritable_lock(store, workdir):
    store.refuse = lambda request: 403 if request.startswith("POST") else None
    with pytest.raises(InputError, match="found a folder that cannot be written .Forbidden"):
        WorkdirLock(workdir, 10)


def report(workdir, start=0):
    config = default_config()
    config.steps, config.batch, config.log.every = 8, 1, 1
    return Progress(workdir, config, start, GoodputClock())


def test_progress_and_logs(store, workdir, caplog):
    def uploads():
        return sum("POST /upload" in request for request in store.asked)

    with report(workdir) as progress:
        progress.note("resumed at step 0")
        for step in (1, 2, 3):
            progress.update(step, {"loss": 1.0})
        assert [row["step"] for row in rows(workdir)] == [1]  # and no upload for half a minute
        before = uploads()
        progress.sync()  # with a checkpoint
        assert [row["step"] for row in rows(workdir)] == [1, 2] and uploads() == before + 3
        store.refuse = lambda request: 403
        progress.sync()
        assert "cannot be written now: Forbidden" in caplog.text
        progress.update(4, {"loss": 1.0})
        store.refuse = lambda request: None
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4]
    with report(workdir, 2) as progress:
        progress.update(3, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in rows(workdir)] == [(1, 1), (2, 1), (3, 2)]
    logged = (workdir / "train.log").read_text()
    assert "resumed at step 0" in logged and logged.count("step 3/8") == 2
    assert '"starts": 2' in (workdir / "goodput.json").read_text()


def test_status(store, workdir):
    with pytest.raises(InputError, match="no such folder; expected a workdir"):
        read_status(workdir)
    write_atomic(workdir / "config.json", json.dumps({"steps": 9, "batch": 2, "log": {"every": 1}}))
    with WorkdirLock(workdir, 9) as claim:
        claim.write_status("running", 2)
    with report(workdir) as progress:
        progress.update(3, {"loss": 1.5})
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(2, make_state(), {})
    checkpoints.close()
    write_atomic(workdir / "checkpoints" / "4" / "manifest.json", "{}")  # not committed
    write_atomic(workdir / "previews" / "0000002.png", b"PNG")
    status_text = (workdir / "status.json").read_text()
    _write_stopped_status(workdir / "status.json", "it hung")  # as gadjax launch does
    assert read_status(workdir)["text"] == "stopped: it hung"
    write_atomic(workdir / "status.json", status_text)
    actual = read_status(str(workdir))
    assert (actual["state"], actual["step"], actual["metrics"]) == ("running", 3, {"loss": 1.5})
    assert actual["checkpoint"]["step"] == 2 and actual["checkpoint"]["age_seconds"] > 0
    assert actual["preview"] == f"{workdir}/previews/0000002.png"


def test_profile_upload(workdir, monkeypatch):
    def start(folder):  # the real one ends the process where a test before has loaded libtpu
        (Path(folder) / "plugins").mkdir(parents=True)
        (Path(folder) / "plugins" / "host.xplane.pb").write_bytes(b"trace")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    messages = []
    profile = Profile((0, 1), workdir, messages.append)
    profile.before_step(0, ())
    jax.block_until_ready(jnp.ones(3) + 1)
    profile.before_step(1, ())
    assert messages == [f"profile of steps 1 to 1: {workdir}/profile"]
    assert any(name.endswith(".xplane.pb") for name in list_objects(workdir / "profile"))
    assert not os.path.exists(profile.local)


@pytest.mark.slow
def test_complete_run(server, workdir, config, tmp_path):
    _, environment = server

    def run(*arguments):
        return run_python("-m", "gadjax", *arguments, **environment)

    train = ["train", "--config", config, "--workdir", workdir, "--config.preview.every=2"]
    run(*train, "--config.steps=2")
    done = run(*train, "--config.steps=4", "--profile=2:1")
    assert "resumed at step 2" in done.stderr, done.stderr
    actual = {name.split("/")[0] for name in list_objects(workdir)}
    expected = {"config.json", "status.json", "run.json", "goodput.json", "metrics.jsonl"}
    assert actual == expected | {"train.log", "health.jsonl", "checkpoints", "previews", "profile"}
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4]
    done = run("status", workdir)
    assert "done" in done.stdout and "step 4, " in done.stdout, done.stderr
    done = run("export", "--workdir", workdir, "--out", tmp_path / "student")
    assert "average of step 4" in done.stdout, done.stderr
    (tmp_path / "prompts.txt").write_text("red circle\n")
    prompts = ["--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "pictures"]
    done = run("sample", "--model", workdir, *prompts)
    assert (tmp_path / "pictures" / "00000-0.png").exists(), done.stderr
