"""Experiment trackers: their calls, and that none of them stops a run."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tiny_run import config_file

from gadjax.errors import InputError
from gadjax.runtime.trackers import Trackers, check_trackers
from gadjax.training.config import default_config, read_config

PICTURE = np.zeros((1, 4, 5, 3), np.uint8)


def config(*names):
    settings = default_config()
    settings.log.trackers = names
    return settings


class FakeRun:
    def __init__(self, logged, fail=()):
        self.logged, self.fail = logged, fail

    def log(self, data, step=None):
        if step in self.fail:
            raise ConnectionError("no\nroute")
        self.logged.append((step, data))

    def finish(self, exit_code=None):
        self.logged.append("finish")


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path):
    """Fakes of wandb and trackio with their signatures, and no tensorflow; their calls."""
    logged, started = {"wandb": [], "trackio": []}, []
    fail = {"wandb": [], "trackio": []}

    def wandb_init(*, project, id, name, dir, config, resume, mode, settings):
        started.append({"id": id, "name": name, "mode": mode, "resume": resume})
        assert config["steps"] == 1000 and settings["console"] == "off"
        return FakeRun(logged["wandb"], fail["wandb"])

    def trackio_init(project, name=None, *, config=None, resume="never", embed=True):
        started.append({"name": name, "resume": resume})
        return FakeRun(logged["trackio"], fail["trackio"])

    for name, init in (("wandb", wandb_init), ("trackio", trackio_init)):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.init, module.Image = init, lambda x, caption=None: x.shape
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return SimpleNamespace(logged=logged, started=started, fail=fail, set=monkeypatch.setenv)


def test_all_trackers_get_the_same(modules, tmp_path):
    notes = []
    trackers = Trackers(tmp_path, config("wandb", "trackio"), notes.append)
    trackers.write_images(2, {"preview": PICTURE})
    trackers.write_scalars(2, {"loss": 0.5})
    trackers.close()
    trackers.close()
    assert modules.logged["wandb"] == [(2, {"preview": [(4, 5, 3)]}), (2, {"loss": 0.5}), "finish"]
    assert modules.logged["trackio"] == [(2, {"preview": (4, 5, 3)}), (2, {"loss": 0.5}), "finish"]
    assert notes == []


def test_a_resumed_run_is_the_same_run(modules, tmp_path):
    for _ in range(2):
        Trackers(tmp_path, config("wandb", "trackio"), print).close()
    first, second = modules.started[:2], modules.started[2:]
    assert first == second
    names = json.loads((tmp_path / "trackers.json").read_text())
    assert first[0]["id"] == names["wandb"] and first[0]["resume"] == "allow"
    assert first[1] == {"name": f"{tmp_path.name}-{names['trackio']}", "resume": "allow"}


def test_an_error_is_reported_once_and_closes_its_tracker(modules, tmp_path):
    notes = []
    modules.fail["wandb"].append(2)
    trackers = Trackers(tmp_path, config("wandb", "trackio"), notes.append)
    for step in (1, 2, 3):
        trackers.write_scalars(step, {})
    trackers.close()
    assert notes == ["wandb stopped: ConnectionError: no route; the run goes on without it"]
    assert modules.logged["wandb"] == [(1, {})]
    assert modules.logged["trackio"] == [(1, {}), (2, {}), (3, {}), "finish"]


def test_a_tracker_that_does_not_start(modules, tmp_path, monkeypatch):
    notes = []
    monkeypatch.delattr(sys.modules["wandb"], "init")
    trackers = Trackers(tmp_path, config("wandb", "trackio"), notes.append)
    trackers.write_scalars(1, {})
    assert len(notes) == 1 and notes[0].startswith("wandb stopped: AttributeError")
    assert modules.logged["trackio"] == [(1, {})]


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_MODE": "online"}, "offline"),  # which would ask for a key
        ({"WANDB_MODE": "disabled"}, None),
        ({"WANDB_API_KEY": "k"}, None),
        ({"NETRC": "netrc"}, None),
        ({"NETRC": "netrc", "WANDB_BASE_URL": "https://wandb.example.org"}, "offline"),
    ],
)
def test_wandb_never_prompts_for_a_key(modules, tmp_path, monkeypatch, variables, mode):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    for name, value in variables.items():
        modules.set(name, value)
    Trackers(tmp_path, config("wandb"), print)
    assert modules.started[0]["mode"] == mode


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    check_trackers(())
    check_trackers(("wandb", "trackio"))
    with pytest.raises(InputError, match="'wandbb'; expected some of wandb, trackio"):
        check_trackers(("wandbb",))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"not installed; expected .* 'gadjax\[wandb\]'"):
        check_trackers(("wandb",))


def test_trackers_of_the_config(tmp_path):
    path = config_file(tmp_path / "c.py")
    for text in ("('wandb',)", "wandb"):
        settings = read_config(["--config", str(path), f"--config.log.trackers={text}"])
        assert settings.log.trackers == ("wandb",)
    settings = read_config(["--config", str(path), "--config.log.trackers=('wandb', 'trackio')"])
    assert settings.log.trackers == ("wandb", "trackio")


def test_tensorboard_where_tensorflow_is(tmp_path, monkeypatch):
    logged, notes = [], []

    class Writer:
        def __init__(self, folder):
            logged.append(folder)

        def write_scalars(self, step, scalars):
            logged.append((step, scalars))

        def write_images(self, step, images):
            raise RuntimeError("full")

    tensorflow = ModuleType("tensorflow")
    tensorflow.__spec__ = ModuleSpec("tensorflow", None)
    visible = lambda devices, kind: logged.append((devices, kind))  # noqa: E731
    tensorflow.config = SimpleNamespace(set_visible_devices=visible)
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    writers = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "clu.metric_writers", writers)
    trackers = Trackers(tmp_path, config(), notes.append)
    trackers.write_scalars(4, {"loss": 2.0})
    trackers.write_images(5, {"preview": PICTURE})
    trackers.write_scalars(6, {"loss": 1.0})
    assert logged == [([], "GPU"), str(tmp_path / "tensorboard"), (4, {"loss": 2.0})]
    assert notes == ["tensorboard stopped: RuntimeError: full; the run goes on without it"]
