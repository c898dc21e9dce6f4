"""What a run that is killed must not lose: by real kills, and at the moments that need luck."""

import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from kills import Failure, Reference, compare, kill_many, undisturbed
from train_runs import rows, steps

from gadjax.checkpoints.checkpoint import Checkpoints
from gadjax.cli.main import main


def train(config: Path, workdir: Path, *more: str) -> int:
    return main(["train", "--config", f"{config}:tdm", "--workdir", str(workdir), *more])


@pytest.mark.slow
def test_a_step_is_in_the_metrics_before_it_is_saved(config, tmp_path, monkeypatch):
    """A run that is killed right after a save does not do that step again."""
    save, present = Checkpoints.save, {}

    def record(self, step, *more):
        present[step] = steps(tmp_path / "run")
        save(self, step, *more)

    monkeypatch.setattr(Checkpoints, "save", record)
    assert train(config, tmp_path / "run") == 0
    assert present == {2: [1, 2], 4: [1, 2, 3, 4]}


@pytest.mark.slow
def test_a_preview_that_a_kill_prevented_is_drawn_by_the_next_start(config, tmp_path):
    workdir, shown = tmp_path / "run", "--config.preview.every=2"
    first = workdir / "previews" / "0000002.png"
    assert train(config, workdir, shown, "--config.steps=2") == 0
    drawn = first.read_bytes()
    first.unlink()  # as if killed between the save and the picture
    assert train(config, workdir, shown) == 0
    assert first.read_bytes() == drawn


@pytest.mark.slow
@pytest.mark.parametrize(
    "left",
    [
        *(pytest.param(left, marks=pytest.mark.slow) for left in ((), ("lock",))),
        ("lock", "config.json.new"),
    ],
)
def test_a_run_that_was_killed_as_it_began_can_begin_again(config, tmp_path, left):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in left:
        (workdir / name).write_text('{"steps": ')
    assert train(config, workdir, "--config.steps=1") == 0


LORA = (
    *("--config.student.lora.rank=2", "--config.critic.lora.rank=4"),
    "--config.int8=/(attn|ff)",
)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), LORA], ids=["whole", "adapters"])
def test_ten_kills_change_nothing(tmp_path, flags):
    tally = kill_many(undisturbed(tmp_path, 120, flags), tmp_path, count=10)
    assert tally.failed == [] and tally.kills == 10
    assert len(tally.where) > 1, tally  # not all in the same place


def lose_a_row(workdir):
    rows = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(rows[:1] + rows[2:]))


def change_a_loss(workdir):
    changed = rows(workdir)
    changed[1]["student/loss"] = np.nextafter(changed[1]["student/loss"], 1)
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in changed))


def change_a_picture(workdir):
    path = workdir / "previews" / "0000002.png"
    path.write_bytes(path.read_bytes()[:-1])


def lose_the_newest(workdir):
    shutil.rmtree(workdir / "checkpoints" / "4")


def change_a_count(workdir):
    """Of an optimizer, and nothing else."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    handler = ocp.PyTreeCheckpointHandler()
    state = handler.restore(workdir / "checkpoints" / "4" / "state")
    state["step"] = state["step"] + 1
    shutil.rmtree(workdir / "checkpoints" / "4")
    checkpoints.manager.reload()
    checkpoints.save(4, state, {})
    checkpoints.close()


CHANGES = lose_a_row, change_a_loss, change_a_picture, lose_the_newest, change_a_count


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("kills") / "whole"
    assert train(config, workdir, "--config.preview.every=2") == 0
    return Reference(config, workdir, workdir.parent, 4, 0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_detected(reference, tmp_path, change):
    other = tmp_path / "other"
    shutil.copytree(reference.workdir, other)
    compare(reference, other)
    change(other)
    with pytest.raises(Failure):
        compare(reference, other)
