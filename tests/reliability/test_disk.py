"""Real file systems that fail, where this machine lets a test mount one."""

import jax
import numpy as np
import optax
import pytest
from disk import ACCIDENTS, BORNE, Disk, Reference, can_mount, try_accident
from flips import restore, shapes

from gadjax.checkpoints.checkpoint import Checkpoints, SaveFailed
from gadjax.training.state import create_state

# Elsewhere tests/training/test_failures.py has the same faults injected.
pytestmark = pytest.mark.skipif(not can_mount(), reason="only root may mount a tmpfs")
MESSAGES = {
    "full": "No space left on device",
    "read_only": "Read-only file system",
    "gone": "is gone",
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_saves_go_on_after_an_accident(tmp_path, accident):
    happen, undo = ACCIDENTS[accident]
    network = {"kernel": jax.random.normal(jax.random.key(0), (512, 512))}  # x 5: 5 MB
    state = create_state({"student": network}, {"student": optax.adam(0.1)})
    with Disk(tmp_path / "disk") as disk:
        folder = disk.mount / "run" / "checkpoints"
        checkpoints = Checkpoints(folder, keep=2)
        checkpoints.save(1, state, {})
        checkpoints.wait()
        happen(disk)
        for step in (2, 3):
            with pytest.raises(
                SaveFailed, match=f"/{step}: cannot be written: .*{MESSAGES[accident]}$"
            ):
                checkpoints.save(step, state, {})
                checkpoints.wait()
        undo(disk)
        assert restore(folder, shapes(folder / "1"))[0] == 1
        checkpoints.save(4, state, {})
        checkpoints.close()
        assert sorted(path.name for path in folder.iterdir()) == ["1", "4"]
        step, found, reported = restore(folder, shapes(folder / "4"))
        assert step == 4 and not reported
        assert sorted(found) == sorted(np.asarray(x).tobytes() for x in jax.tree.leaves(state))


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    return Reference(config, tmp_path_factory.mktemp("disk"), steps=200).run()


@pytest.mark.slow
@pytest.mark.parametrize("failures", [0, BORNE])
@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_run_loses_nothing(reference, tmp_path, accident, failures):
    try_accident(reference, tmp_path / "run", accident, failures)
