"""Workdirs made by hand: what `gadjax train` leaves behind, without training."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gadjax.cli.main import main
from gadjax.convert.files import fingerprint
from gadjax.convert.folder import read_pipeline
from gadjax.convert.tensors import tensors_from_params
from gadjax.training.checkpoint import Checkpoints
from gadjax.training.config import as_json, default_config, write_json
from gadjax.training.state import create

TIMESTEPS = (899, 674, 449, 224)
LENGTH = 8


def make_workdir(folder: Path, teacher: Path, **changes) -> Path:
    """Steps 1 and 2 of a run: the student of each and its average all differ."""
    config = default_config()
    config.teacher = str(teacher)
    config.objective = {"dmd": {}, "gad": {"weight": 0.3, "steps": 4}}
    config.guidance = 3.0
    config.student.timesteps = TIMESTEPS
    config.data.length = LENGTH
    config.update(changes)
    part = read_pipeline(teacher, components=("transformer",)).components["transformer"]
    identity = fingerprint(tensors_from_params(part.params, part.module.KEYMAP))
    folder.mkdir(parents=True)
    write_json(config, folder / "config.json")
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (1, 2):
        state = create(
            {"student": jax.tree.map(lambda x, s=step: jnp.asarray(x) + 0.01 * s, part.params)},
            {"student": optax.sgd(1e-3)},
        )
        ema = jax.tree.map(lambda x, s=step: jnp.asarray(x) * (1 - 0.02 * s), part.params)
        state = state._replace(step=jnp.int32(step), ema=ema)
        checkpoints.save(step, state, {"config": as_json(config), "teacher": identity})
    checkpoints.close()
    return folder


@pytest.fixture(scope="session")
def workdir(tiny_pipeline, tmp_path_factory) -> Path:
    """Of a student in four steps; to be read and not changed."""
    return make_workdir(tmp_path_factory.mktemp("runs") / "student", tiny_pipeline)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle above a blue square\ngreen square\n")
    return path


@pytest.fixture
def gadjax(capsys):
    """Call a command: `gadjax("sample", ...)` gives what it printed, and fails unless it did."""

    def call(*arguments) -> str:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


@pytest.fixture
def fails(capsys):
    """Call a command that fails with `code`: one line on stderr with `words`, nothing written."""

    def call(arguments, code: int, *words, out: Path):
        before = sorted(out.parent.rglob("*"))
        assert main([str(argument) for argument in arguments]) == code
        said = capsys.readouterr().err
        assert said.startswith("gadjax: ") and said.count("\n") == 1, said
        for word in words:
            assert str(word) in said
        assert sorted(out.parent.rglob("*")) == before

    return call


def numbers(images) -> np.ndarray:
    """PIL pictures as [N, H, W, 3] from 0 to 1."""
    return np.stack([np.asarray(image, np.float32) / 255 for image in images])


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
