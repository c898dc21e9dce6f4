"""Damage to checkpoints, found file by file, and survived."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flips import Damage, damage_many, draw, restore, shapes
from real_runs import state_of
from train_runs import rows

from gadjax.checkpoints.checkpoint import Checkpoints
from gadjax.cli.main import main
from gadjax.training.state import create_state


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Checkpoints 2, 4 and 6, of other values each."""
    folder = tmp_path_factory.mktemp("flips") / "checkpoints"
    network = {"kernel": jax.random.normal(jax.random.key(0), (32, 16)), "bias": jnp.arange(5.0)}
    state = create_state({"student": network}, {"student": optax.adam(0.1)})
    checkpoints = Checkpoints(folder)
    for step in (2, 4, 6):
        moved = jax.tree.map(lambda x, step=step: x + np.asarray(step, x.dtype), state)
        checkpoints.save(step, moved, {"step": step})
    checkpoints.close()
    return folder


@pytest.mark.slow
def test_every_damage_is_detected_and_the_previous_step_restored(steps):
    done, failures = damage_many(steps, 60)
    assert failures == [] and set(done.values()) == {20}
    step, found, lines = restore(steps, shapes(steps / "6"))
    assert step == 6 and not lines


def test_every_file_is_drawn(steps):
    files = {str(p.relative_to(steps / "6")) for p in (steps / "6").rglob("*") if p.is_file()}
    assert {damage.name for damage in draw(steps / "6", 500, 0)} == files
    assert {"manifest.json", "_CHECKPOINT_METADATA", "commit_success.txt"} < files


def test_undetected_damage_is_a_failure(steps, monkeypatch):
    monkeypatch.setattr("gadjax.checkpoints.steps.verify", lambda folder: None)
    monkeypatch.setattr("flips.draw", lambda *more: [Damage("flip", "commit_success.txt", 9)])
    _, failures = damage_many(steps, 1)
    assert len(failures) == 1 and "commit_success.txt" in failures[0] and "logged []" in failures[0]


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bits_after_a_flip(config, tmp_path, caplog):
    def train(name, steps):
        command = ["train", "--config", str(config), "--workdir", str(tmp_path / name)]
        assert main([*command, f"--config.steps={steps}"]) == 0

    train("whole", 6)
    train("run", 4)
    newest = tmp_path / "run" / "checkpoints" / "4"
    draw(newest, 1, 0)[0].do(newest)
    train("run", 6)
    assert f"{newest}: damaged checkpoint skipped: " in caplog.text
    assert "resumed at step 2" in (tmp_path / "run" / "train.log").read_text()
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert state_of(tmp_path / "run") == state_of(tmp_path / "whole")
