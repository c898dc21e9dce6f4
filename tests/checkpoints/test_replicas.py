"""Replica check: a flipped bit in one device's replica is detected, reported and never saved."""

import os
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from several import ROOT, run_on_devices, start

from gadjax.runtime.supervisor import free_port

# Mesh (data, fsdp, tensor) -> nothing is replicated along fsdp or tensor where a leaf is split.
MESHES = (8, 1, 1), (2, 4, 1), (2, 2, 2)
RNG = np.random.default_rng(0)
LEAVES = {
    "wide": (RNG.normal(size=(16, 24)).astype(np.float32), ("fsdp", "tensor")),
    "tall": (RNG.normal(size=(16, 3)).astype(ml_dtypes.bfloat16), ("fsdp",)),
    "both": (RNG.normal(size=(16,)).astype(np.float16), (("fsdp", "tensor"),)),
    "ints": (np.arange(-3, 4, dtype=np.int32), ()),
    "bytes": (np.arange(7, dtype=np.uint8), ()),
    "bools": (np.array([True, False, True]), ()),
    "step": (np.int32(7), ()),
}


def put_on_mesh(mesh, memory=None):
    """Training state with LEAVES as its EMA."""
    from gadjax.parallel import sharding
    from gadjax.training.state import TrainState

    arrays = {name: x for name, (x, _) in LEAVES.items()}
    shardings = {
        name: NamedSharding(mesh, PartitionSpec(*spec), memory_kind=memory)
        for name, (_, spec) in LEAVES.items()
    }
    step = sharding.put_on_mesh(np.int32(0), sharding.replicated(mesh))
    return TrainState(step, {}, sharding.put_on_mesh(arrays, shardings), {}, {})


def change(x, number, corrupt_fn):
    """The array with the shard of one device changed by corrupt_fn(numpy array); that device."""
    parts = [shard.data for shard in x.addressable_shards]
    device, memory = parts[number].device, x.sharding.memory_kind
    part = np.array(parts[number])
    corrupt_fn(part)
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind=memory)
    parts[number] = jax.device_put(part, sharding)
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts), device


def flip(bit):
    """Flip a bit of the middle element; negate a bool, whatever the bit."""

    def corrupt_fn(part):
        if part.dtype == bool:
            part.reshape(-1)[part.size // 2] ^= True
            return
        words = part.reshape(-1).view(f"uint{8 * part.itemsize}")
        words[part.size // 2] ^= words.dtype.type(1 << bit)

    return corrupt_fn


def swap(part):
    part[[0, 1]] = part[[1, 0]]


def opposite(part):
    """Change the sign of two elements, which a plain weighted sum may miss."""
    part.reshape(-1)[[0, 2]] *= -1


def expect(state, name, devices):
    from gadjax.checkpoints.replicas import differing_leaves

    assert differing_leaves(state) == ({f"ema/{name}": devices} if devices else {})


def worker() -> None:
    from gadjax.checkpoints.replicas import differing_leaves
    from gadjax.parallel.sharding import AXES, HOST_MEMORY, make_mesh

    for sizes in MESHES:
        mesh = make_mesh(dict(zip(AXES, sizes, strict=False)))
        state = put_on_mesh(mesh)
        assert differing_leaves(state) == {}
        for number, (name, x) in enumerate(state.ema.items()):
            for corrupt_fn in [flip(0), flip(8 * x.dtype.itemsize - 1)]:
                corrupted, device = change(x, (3 * number) % 8, corrupt_fn)
                copies = {d for d, i in places(x).items() if i == places(x)[device]}
                # Of two that differ either may be the right one.
                wrong = [device] if len(copies) > 2 else sorted(copies, key=order(mesh))
                expect(state._replace(ema=state.ema | {name: corrupted}), name, wrong)
    mesh = make_mesh({"data": 8})
    state = put_on_mesh(mesh)
    for corrupt_fn in (swap, opposite):
        corrupted, device = change(state.ema["wide"], 5, corrupt_fn)
        expect(state._replace(ema=state.ema | {"wide": corrupted}), "wide", [device])
    state = put_on_mesh(mesh, HOST_MEMORY)
    assert differing_leaves(state) == {}
    corrupted, device = change(state.ema["tall"], 6, flip(3))
    expect(state._replace(ema=state.ema | {"tall": corrupted}), "tall", [device])
    # Where nothing is replicated nothing is done.
    mesh = make_mesh({"fsdp": 8})
    sharded = jax.device_put(np.arange(16.0), NamedSharding(mesh, PartitionSpec("fsdp")))
    corrupted, _ = change(sharded, 2, flip(0))
    state = put_on_mesh(make_mesh({"data": 1}, jax.devices()[:1]))
    assert differing_leaves(state._replace(step=corrupted)) == {}


def places(x):
    return {d: str(i) for d, i in x.sharding.devices_indices_map(x.shape).items()}


def order(mesh):
    return list(mesh.devices.flat).index


def peers() -> None:
    """One of two processes with four devices each; a replica of the second is corrupted."""
    from gadjax.checkpoints.replicas import check_replicas, differing_leaves
    from gadjax.errors import RunStopped
    from gadjax.parallel import sharding
    from gadjax.parallel.sharding import make_mesh
    from gadjax.runtime.distributed import initialize_distributed

    initialize_distributed()
    mesh = make_mesh({"data": 2, "fsdp": 4})
    state = put_on_mesh(mesh)
    assert differing_leaves(state) == {}
    # Sums over devices and processes come out the same on all.
    rows = RNG.normal(size=(64, 48)).astype(np.float32)
    rows = sharding.put_on_mesh(rows, sharding.batch_sharding(mesh))
    weight = sharding.put_on_mesh(
        RNG.normal(size=(48, 40)).astype(np.float32), sharding.replicated(mesh)
    )
    gradient = jax.grad(lambda w, x: jax.numpy.sin(x @ w).sum())
    state.ema["summed"] = jax.jit(gradient, out_shardings=sharding.replicated(mesh))(weight, rows)
    assert differing_leaves(state) == {}
    if jax.process_index() == 1:
        state.ema["ints"], device = change(state.ema["ints"], 2, flip(5))
    checkpoints = SimpleNamespace(wait=lambda: None, folder=Path("no such folder"))
    with pytest.raises(RunStopped) as stopped:
        check_replicas(state, 4, checkpoints)
    device = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))[6]
    assert str(stopped.value) == (
        f"step 4: ema/ints: found other bits on device {device.id} (process 1) than on its "
        "replicas; expected the same on all; not saved, the latest valid checkpoint is none"
    )


def training(config: Path, workdir: Path) -> None:
    """A run that saves after steps 2 and 4, with a bit flipped on one device after step 3."""
    from gadjax.cli.main import main
    from gadjax.runtime.profiler import Profile

    def corrupt(self, step, state):
        if step == 3:
            place = state.params["student"]["proj_out"]
            place["kernel"], _ = change(place["kernel"], 5, flip(20))

    command = ["train", "--config", f"{config}:tdm", "--workdir", str(workdir)]
    before_step, Profile.before_step = (
        Profile.before_step,
        corrupt,
    )  # is called with the state before every step
    with redirect_stderr(StringIO()) as stderr:
        assert main([*command, "--config.mesh.data=8"]) == 3
    line = stderr.getvalue().splitlines()[-1]
    # The EMA follows it.
    assert "step 4: params/student/proj_out/kernel: found other bits on device 5 (process " in line
    assert "1 more leaves that differ" in line and "latest valid checkpoint is 2" in line
    assert sorted(path.name for path in (workdir / "checkpoints").glob("[0-9]*")) == ["2"]
    Profile.before_step = before_step
    assert main([*command, "--config.mesh.data=8"]) == 0


def test_a_flipped_bit_in_any_replica_is_detected():
    run_on_devices(8, __file__)


@pytest.mark.slow
def test_every_process_detects_it():
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    port = free_port()
    both = [start([__file__, "peers"], i, 2, port, 4, PYTHONPATH=path) for i in range(2)]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs


@pytest.mark.slow  # compiles the updates for eight devices
def test_a_run_stops_before_saving_and_resumes(config, tmp_path):
    run_on_devices(8, __file__, config, tmp_path / "run")


if __name__ == "__main__":
    if sys.argv[1:] == ["peers"]:
        peers()
    elif len(sys.argv) > 1:
        training(*map(Path, sys.argv[1:]))
    else:
        worker()
