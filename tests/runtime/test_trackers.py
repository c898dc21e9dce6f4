"""Optional writers: what they are told, and that none of them stops a run."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.runtime.trackers import Trackers, check_trackers
from gadjax.training.config import default_config, read_config

PICTURE = np.zeros((1, 4, 5, 3), np.uint8)


def config(*names):
    found = default_config()
    found.log.trackers = names
    return found


class FakeRun:
    def __init__(self, told, fail=()):
        self.told, self.fail = told, fail

    def log(self, data, step=None):
        if step in self.fail:
            raise ConnectionError("no\nroute")
        self.told.append((step, data))

    def finish(self, exit_code=None):
        self.told.append("finish")


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path):
    """Fakes of wandb and trackio with their signatures, and no tensorflow; all that they hear."""
    told, started = {"wandb": [], "trackio": []}, []
    fail = {"wandb": [], "trackio": []}

    def wandb_init(*, project, id, name, dir, config, resume, mode, settings):
        started.append({"id": id, "name": name, "mode": mode, "resume": resume})
        assert config["steps"] == 1000 and settings["console"] == "off"
        return FakeRun(told["wandb"], fail["wandb"])

    def trackio_init(project, name=None, *, config=None, resume="never", embed=True):
        started.append({"name": name, "resume": resume})
        return FakeRun(told["trackio"], fail["trackio"])

    for name, init in (("wandb", wandb_init), ("trackio", trackio_init)):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.init, module.Image = init, lambda x, caption=None: x.shape
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return SimpleNamespace(told=told, started=started, fail=fail, set=monkeypatch.setenv)


def test_all_hear_the_same(modules, tmp_path):
    notes = []
    trackers = Trackers(tmp_path, config("wandb", "trackio"), notes.append)
    trackers.write_images(2, {"preview": PICTURE})
    trackers.write_scalars(2, {"loss": 0.5})
    trackers.close()
    trackers.close()
    assert modules.told["wandb"] == [(2, {"preview": [(4, 5, 3)]}), (2, {"loss": 0.5}), "finish"]
    assert modules.told["trackio"] == [(2, {"preview": (4, 5, 3)}), (2, {"loss": 0.5}), "finish"]
    assert notes == []


def test_a_resumed_run_is_the_same_run(modules, tmp_path):
    for _ in range(2):
        Trackers(tmp_path, config("wandb", "trackio"), print).close()
    first, second = modules.started[:2], modules.started[2:]
    assert first == second
    names = json.loads((tmp_path / "trackers.json").read_text())
    assert first[0]["id"] == names["wandb"] and first[0]["resume"] == "allow"
    assert first[1] == {"name": f"{tmp_path.name}-{names['trackio']}", "resume": "allow"}


def test_a_fault_is_noted_once_and_ends_that_one(modules, tmp_path):
    notes = []
    modules.fail["wandb"].append(2)
    trackers = Trackers(tmp_path, config("wandb", "trackio"), notes.append)
    for step in (1, 2, 3):
        trackers.write_scalars(step, {})
    trackers.close()
    assert notes == ["wandb stopped: ConnectionError: no route; the run goes on without it"]
    assert modules.told["wandb"] == [(1, {})]
    assert modules.told["trackio"] == [(1, {}), (2, {}), (3, {}), "finish"]


def test_one_that_does_not_even_start(modules, tmp_path, monkeypatch):
    notes = []
    monkeypatch.delattr(sys.modules["wandb"], "init")
    trackers = Trackers(tmp_path, config("wandb", "trackio"), notes.append)
    trackers.write_scalars(1, {})
    assert len(notes) == 1 and notes[0].startswith("wandb stopped: AttributeError")
    assert modules.told["trackio"] == [(1, {})]


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
def test_nobody_is_asked_for_a_key(modules, tmp_path, monkeypatch, variables, mode):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    for name, value in variables.items():
        modules.set(name, value)
    Trackers(tmp_path, config("wandb"), print)
    assert modules.started[0]["mode"] == mode


def test_what_cannot_be_is_refused(monkeypatch):
    check_trackers(())
    check_trackers(("wandb", "trackio"))
    with pytest.raises(InputError, match="'wandbb'; expected some of wandb, trackio"):
        check_trackers(("wandbb",))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"not installed; expected .* 'gadjax\[wandb\]'"):
        check_trackers(("wandb",))


def test_they_are_asked_for_in_the_config(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from gadjax.training.config import default_config\n\n"
        "def get_config():\n    return default_config()\n"
    )
    for text in ("('wandb',)", "wandb"):
        found = read_config(["--config", str(path), f"--config.log.trackers={text}"])
        assert found.log.trackers == ("wandb",)
    found = read_config(["--config", str(path), "--config.log.trackers=('wandb', 'trackio')"])
    assert found.log.trackers == ("wandb", "trackio")


def test_tensorboard_where_tensorflow_is(tmp_path, monkeypatch):
    told, notes = [], []

    class Writer:
        def __init__(self, folder):
            told.append(folder)

        def write_scalars(self, step, scalars):
            told.append((step, scalars))

        def write_images(self, step, images):
            raise RuntimeError("full")

    tensorflow = ModuleType("tensorflow")
    tensorflow.__spec__ = ModuleSpec("tensorflow", None)
    visible = lambda devices, kind: told.append((devices, kind))  # noqa: E731
    tensorflow.config = SimpleNamespace(set_visible_devices=visible)
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    writers = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "clu.metric_writers", writers)
    trackers = Trackers(tmp_path, config(), notes.append)
    trackers.write_scalars(4, {"loss": 2.0})
    trackers.write_images(5, {"preview": PICTURE})
    trackers.write_scalars(6, {"loss": 1.0})
    assert told == [([], "GPU"), str(tmp_path / "tensorboard"), (4, {"loss": 2.0})]
    assert notes == ["tensorboard stopped: RuntimeError: full; the run goes on without it"]
