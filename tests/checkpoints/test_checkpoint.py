"""Checkpoints: bit-identical on any mesh; damage is detected, reported and skipped."""

import asyncio
import errno
import json
import logging
import os
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding
from programs import run_python
from several import variables

from gadjax.checkpoints import checkpoint
from gadjax.checkpoints.checkpoint import Checkpoints, SaveFailed
from gadjax.checkpoints.restore import read_params
from gadjax.checkpoints.save_policy import SavePolicy
from gadjax.errors import InputError, RunStopped
from gadjax.io.manifest import MANIFEST, verify, write_manifest
from gadjax.training.state import TrainState, create_state

STATE = """
import jax, jax.numpy as jnp, optax
from gadjax.training.state import create_state

@jax.jit
def make_state():
    keys = jax.random.split(jax.random.key(0), 4)
    def net(a, b):
        kernel = jax.random.normal(a, (2, 64, 48))
        return {"blocks": {"0": {"kernel": kernel}, "norm": {"scale": jnp.arange(48.0)}},
                "table": jax.random.normal(b, (16, 8)).astype(jnp.bfloat16)}
    params = {"student": net(keys[0], keys[1]), "critic": net(keys[2], keys[3])}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(
        optax.linear_schedule(0.0, 1e-3, 5)))
    state = create_state(params, {role: optimizer for role in params})
    updates, opt = optimizer.update(params["student"], state.opt["student"], params["student"])
    return state._replace(step=jnp.int32(7), opt=state.opt | {"student": opt},
                          bad=state.bad | {"critic": jnp.int32(2)})
"""
exec(STATE)


def shapes(state: TrainState) -> TrainState:
    place = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def assert_same(restored, expected):
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def state():
    return make_state()  # noqa: F821 (from STATE, which the subprocess runs too)


@pytest.fixture
def folder(tmp_path, state):
    """Steps 2 and 4, where 4 holds `state`."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state._replace(step=jnp.int32(2)), {"seed": 2})
    checkpoints.save(4, state, {"seed": 4, "config": {"a": [1, 2]}})
    checkpoints.close()
    return tmp_path


def restore(folder: Path, abstract: TrainState):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(abstract)
    finally:
        checkpoints.close()


def largest(path: Path) -> Path:
    return max((p for p in path.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << bit
    path.write_bytes(data)


def test_round_trip_keeps_every_bit(folder, state):
    step, restored, meta = restore(folder, shapes(state))
    assert (step, meta) == (4, {"seed": 4, "config": {"a": [1, 2]}})
    assert_same(restored, state)
    assert type(restored.opt["student"]) is type(state.opt["student"])


def test_no_checkpoints(tmp_path, state):
    assert restore(tmp_path / "new", shapes(state)) is None


def test_state_may_be_donated_while_it_is_written(tmp_path):
    leaf = {"w": jax.random.normal(jax.random.key(0), (2048, 1024))}
    state = create_state({"student": leaf}, {"student": optax.sgd(0.1)})
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    change = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    for _ in range(20):
        state = change(state)
    _, restored, _ = checkpoints.restore(shapes(state))
    checkpoints.close()
    assert_same(restored, expected)


def files_of(step: Path) -> set[str]:
    return {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}


def test_every_committed_step_has_a_manifest_of_every_file(folder):
    for step in (folder / "2", folder / "4"):
        assert json.loads((step / "manifest.json").read_text()).keys() == files_of(step)
        assert {"state/_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt"} < files_of(step)
        assert verify(step) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def add_file(path: Path) -> None:
    path.with_name("stray").write_text("of another step")


NAMES = "state/_METADATA", "meta/metadata", "manifest.json", "_CHECKPOINT_METADATA", "largest"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, add_file])
def test_a_damaged_step_is_logged_and_skipped(folder, state, damage, name, caplog):
    path = largest(folder / "4") if name == "largest" else folder / "4" / name
    damage(path)
    with caplog.at_level(logging.WARNING, "gadjax"):
        checkpoints = Checkpoints(folder)
        step, restored, meta = checkpoints.restore(shapes(state))
    assert (step, meta, int(restored.step)) == (2, {"seed": 2}, 2)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("gadjax")]
    assert len(lines) == 1 and "\n" not in lines[0]
    named = "stray" if damage is add_file else path.name
    assert str(folder / "4") in lines[0] and named in lines[0]
    # Training goes on from step 2 and writes step 4 again.
    checkpoints.save(4, state, {"again": True})
    checkpoints.close()
    step, restored, meta = restore(folder, shapes(state))
    assert (step, meta) == (4, {"again": True})
    assert_same(restored, state)
    assert (folder / "damaged" / "4").is_dir()


def test_manifest_detects_every_flipped_bit_of_itself(tmp_path):
    (tmp_path / "a").write_bytes(b"weights")
    write_manifest(tmp_path)
    manifest = tmp_path / MANIFEST
    manifest_bytes = manifest.read_bytes()
    assert verify(tmp_path) is None and manifest_bytes.count(b"\n") > 5
    for bit in range(8 * len(manifest_bytes)):
        data = bytearray(manifest_bytes)
        data[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(data)
        assert verify(tmp_path).startswith("manifest.json: "), bit
    for length in range(len(manifest_bytes)):
        manifest.write_bytes(manifest_bytes[:length])
        assert verify(tmp_path).startswith("manifest.json: "), length
    for text in ("[]", "1", '{"a": 1}', "[" * 100_000, '{"../a": {"size": 7}}'):
        manifest.write_text(text)
        assert verify(tmp_path), text


def test_a_run_that_died_right_after_a_commit(folder, state):
    """Its step is verified and restored without the files that Orbax wrote at the commit."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(6, state, {})
    checkpoints.manager.wait_until_finished()
    late = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert files_of(folder / "6") - json.loads((folder / "6" / MANIFEST).read_text()).keys() == late
    for name in late:
        flip(folder / "6" / name)
    (folder / "6" / "manifest.json.new").write_text("half")
    step, restored, _ = restore(folder, shapes(state))
    assert step == 6
    assert_same(restored, state)


def test_manifest_without_its_checksum(folder, state):
    path = folder / "4" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest[MANIFEST]
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    assert restore(folder, shapes(state))[0] == 2


def test_a_pipe_as_manifest_does_not_block(folder):
    manifest = folder / "4" / MANIFEST
    manifest.unlink()
    os.mkfifo(manifest)
    assert verify(manifest.parent) == "manifest.json: cannot be read"


def test_a_disk_that_cannot_be_read(folder, state, monkeypatch, caplog):
    """A bad sector is damage; a lost disk is not, or valid steps would be moved to `damaged`."""
    bad = str(largest(folder / "4"))
    number = errno.EIO
    opened = Path.open

    def fail(path, *arguments, **more):
        if str(path) == bad:
            raise OSError(number, os.strerror(number))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", fail)
    assert read_params(folder)[0] == 2
    assert f"{bad}: cannot be read: Input/output error" in caplog.text
    number = errno.ESTALE
    with pytest.raises(RunStopped, match="4: cannot be read: Stale file handle"):
        restore(folder, shapes(state))


def test_all_damaged_stops_every_time(folder, state):
    for step in (2, 4):
        flip(largest(folder / str(step)))
    for _ in range(2):
        with pytest.raises(RunStopped, match=r"damaged checkpoints \(4, 2\)"):
            restore(folder, shapes(state))
        with pytest.raises(RunStopped, match=r"damaged checkpoints \(4, 2\)"):
            read_params(folder)


def test_stale_temporary_folder(folder, state):
    stale = folder / "6.orbax-checkpoint-tmp"
    (stale / "state").mkdir(parents=True)
    (stale / "state" / "junk").write_text("half")
    checkpoints = Checkpoints(folder)
    assert checkpoints.restore(shapes(state))[0] == 4
    checkpoints.save(6, state, {})
    checkpoints.close()
    assert not stale.exists() and not (folder / "6" / "state" / "junk").exists()
    assert restore(folder, shapes(state))[0] == 6


def test_another_tree_is_refused_by_leaf(folder, state):
    abstract = shapes(state)
    ema = abstract.ema | {"table": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
    with pytest.raises(InputError, match=r"ema/table: found bfloat16\[16, 8\]; expected float32"):
        restore(folder, abstract._replace(ema=ema))
    ema = abstract.ema | {"table": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)}
    with pytest.raises(InputError, match=r"found bfloat16\[16, 8\]; expected bfloat16\[8, 16\]"):
        restore(folder, abstract._replace(ema=ema))
    ema = abstract.ema | {"new": abstract.step}
    with pytest.raises(InputError, match=r"ema/new: found nothing; expected int32\[\]"):
        restore(folder, abstract._replace(ema=ema))
    params = {"student": abstract.params["student"]}
    with pytest.raises(InputError, match=r"params/critic/\S+: found \S+\[.*\]; expected nothing"):
        restore(folder, abstract._replace(params=params))
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]


def test_read_params(folder, state):
    step, ema, meta = read_params(folder)
    assert (step, meta["seed"]) == (4, 4)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(ema))
    assert_same(ema, state.ema)
    assert_same(read_params(folder, "critic", 2)[1], state.params["critic"])
    with pytest.raises(InputError, match="found 4, 2; expected 3"):
        read_params(folder, "ema", 3)
    with pytest.raises(InputError, match="found 'emma'"):
        read_params(folder, "emma")
    with pytest.raises(InputError, match="found no checkpoint"):
        read_params(folder / "nowhere")
    flip(largest(folder / "4"))
    assert read_params(folder, "student")[0] == 2
    with pytest.raises(InputError, match="CRC-32 differs"):
        read_params(folder, "ema", 4)


def test_a_failed_read_of_intact_files_is_no_damage(folder, state, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("gadjax.checkpoints.restore._read_meta", full)
    with pytest.raises(RunStopped, match="4: cannot be restored: RESOURCE_EXHAUSTED: out of mem"):
        read_params(folder)
    with pytest.raises(RunStopped, match="4: cannot be restored: RESOURCE_EXHAUSTED: out of mem"):
        restore(folder, shapes(state))
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]


def test_read_params_of_a_run_without_critic(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    only = {"student": state.params["student"]}
    checkpoints.save(1, create_state(only, {"student": optax.sgd(0.1)}), {})
    checkpoints.close()
    with pytest.raises(InputError, match="found no critic"):
        read_params(tmp_path, "critic")


def test_newest_steps_are_kept(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 5):
        checkpoints.save(step, state, {})
    checkpoints.save(4, state, {"second": "is left out"})
    checkpoints.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [3, 4]
    assert read_params(tmp_path)[2] == {}


def test_restore_removes_steps_a_killed_run_left(folder, state):
    checkpoints = Checkpoints(folder, keep=1)
    step, restored, _ = checkpoints.restore(shapes(state))
    checkpoints.close()
    assert step == 4 and [p.name for p in folder.iterdir()] == ["4"]
    assert_same(restored, state)


FULL = ValueError("RESOURCE_EXHAUSTED: Error writing\nblock [No space left on device]")


def fail(*arguments, **more):
    raise FULL


def assert_remaining(folder: Path, expected: list[str]) -> None:
    """Wait until only these names remain: Orbax removes files in the background."""
    deadline = time.monotonic() + 10
    while (restored := sorted(p.name for p in folder.iterdir())) != expected:
        assert time.monotonic() < deadline, restored
        time.sleep(0.01)


# Where a save fails: after the files, as it begins, or after the commit.
PLACES = (
    "gadjax.checkpoints.checkpoint.write_manifest",
    "orbax.checkpoint.StandardCheckpointHandler.async_save",
    "gadjax.checkpoints.checkpoint.finalize_manifest",
)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("place", PLACES)
def test_a_save_that_fails(tmp_path, state, monkeypatch, caplog, place):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, state, {"step": step})
    checkpoints.wait()
    for step in (3, 4):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            words = f"/{step}: cannot be written: No space left on device$"
            with pytest.raises(SaveFailed, match=words):
                checkpoints.save(step, state, {"step": step})
                checkpoints.wait()
    assert "Traceback" not in caplog.text
    checkpoints.save(5, state, {"step": 5})
    checkpoints.close()
    # Files that Orbax still writes in the background are removed at the next start.
    step, restored, meta = restore(tmp_path, shapes(state))
    has_manifest = place.endswith("finalize_manifest")  # all but the files of the commit
    assert_remaining(tmp_path, ["4", "5"] if has_manifest else ["2", "5"])
    assert (step, meta) == (5, {"step": 5})
    assert_same(restored, state)


def test_partial_files_of_a_failed_save_are_removed(folder, state, monkeypatch):
    """Removed at once: they may be filling the disk."""
    checkpoints = Checkpoints(folder)
    monkeypatch.setattr("gadjax.checkpoints.checkpoint.write_manifest", fail)
    checkpoints.save(6, state, {})
    with pytest.raises(SaveFailed):
        checkpoints.wait()
    assert_remaining(folder, ["2", "4"])
    checkpoints.close()


def test_a_cancelled_save_is_a_failed_save(folder, state, monkeypatch):
    """Orbax reports nothing about a cancelled save."""

    def cancel(path):
        raise asyncio.CancelledError

    checkpoints = Checkpoints(folder)
    with monkeypatch.context() as patch:
        patch.setattr("gadjax.checkpoints.checkpoint.write_manifest", cancel)
        checkpoints.save(6, state, {})
        with pytest.raises(SaveFailed, match="/6: cannot be written: Orbax cancelled the save$"):
            checkpoints.wait()
    checkpoints.save(7, state, {})
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "7"]


def test_a_mount_that_is_lost_and_comes_back(tmp_path, state):
    folder = tmp_path / "mount" / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    for step in (2, 3):
        with pytest.raises(SaveFailed, match=f"/{step}: cannot be written: the folder is gone$"):
            checkpoints.save(step, state, {})
        assert not (tmp_path / "mount").exists()  # nothing is hidden beneath it
    (tmp_path / "elsewhere").rename(tmp_path / "mount")
    checkpoints.save(4, state, {})
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "4"]
    assert restore(folder, shapes(state))[0] == 4


@pytest.mark.parametrize("name", ["write_manifest", "finalize_manifest"])
def test_consecutive_failures_up_to_the_maximum_are_tolerated(tmp_path, state, monkeypatch, name):
    original = getattr(checkpoint, name)

    def fail_some(folder):
        if int(folder.name.split(".")[0]) in (1, 2, 4, 5, 6):
            raise FULL
        original(folder)

    monkeypatch.setattr(checkpoint, name, fail_some)
    notes = []
    checkpoints = Checkpoints(tmp_path)
    saves = SavePolicy(checkpoints, 2, notes.append)
    for step in range(1, 7):  # with 3, the count begins again
        saves.save(step, state, {}, last=False)
    assert [line[len(str(tmp_path)) :] for line in notes] == [
        f"/{step}: cannot be written: No space left on device (failure {n} of 2 tolerated)"
        for step, n in ((1, 1), (2, 2), (4, 1), (5, 2))
    ]
    with pytest.raises(SaveFailed, match="/6: cannot be written"):
        saves.save(7, state, {}, last=False)
    checkpoints.close()
    assert restore(tmp_path, shapes(state))[0] == (3 if name == "write_manifest" else 6)


def test_the_last_save_may_not_fail(tmp_path, state, monkeypatch):
    notes = []
    checkpoints = Checkpoints(tmp_path)
    saves = SavePolicy(checkpoints, 5, notes.append)
    monkeypatch.setattr(PLACES[1], fail)
    saves.save(1, state, {}, last=False)
    with pytest.raises(SaveFailed, match="/2: cannot be written"):
        saves.save(2, state, {}, last=True)
    assert len(notes) == 1


def test_other_meshes_read_the_same_bits(tmp_path):
    script = STATE + textwrap.dedent(
        """
        import sys, hashlib
        from pathlib import Path
        import numpy as np
        from jax.sharding import PartitionSpec as P
        from gadjax.checkpoints.checkpoint import Checkpoints
        from gadjax.parallel.sharding import make_mesh, shardings

        rules = [("kernel", P(None, "fsdp")), ("table", P("fsdp", None)), ("scale", P("data"))]
        folder = Path(sys.argv[1])

        def digest(state):
            bits = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))
            return hashlib.sha256(bits).hexdigest()

        def on(sizes, count):
            mesh = make_mesh(dict(zip(("data", "fsdp"), sizes)), jax.devices()[:count])
            return shardings(jax.eval_shape(make_state), rules, mesh)

        state = jax.device_put(make_state(), on((2, 4), 8))
        assert not state.ema["blocks"]["0"]["kernel"].is_fully_replicated
        checkpoints = Checkpoints(folder)
        checkpoints.save(3, state, {})
        for sizes, count in (((8, 1), 8), ((1, 8), 8), ((2, 2), 4), ((1, 1), 1)):
            abstract = jax.tree.map(
                lambda x, sh: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sh),
                jax.eval_shape(make_state), on(sizes, count))
            step, found, _ = checkpoints.restore(abstract)
            same = jax.tree.map(lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim),
                                found, abstract)
            assert step == 3 and all(jax.tree.leaves(same))
            assert digest(found) == digest(state), sizes
        checkpoints.close()
        """
    )
    run_python("-c", script, tmp_path, **variables(8))
    # What eight devices wrote, this process reads on its own.
    state = make_state()  # noqa: F821
    assert_same(restore(tmp_path, shapes(state))[1], state)
    assert_same(read_params(tmp_path, "student")[1], state.params["student"])
