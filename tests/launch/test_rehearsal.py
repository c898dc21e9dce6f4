"""A job under SLURM from start to end, with real training processes: TERM, KILL, and a last start
on another mesh, after which the losses are those of an uninterrupted run."""

import json
import os
import signal
import sys
import time

import numpy as np
import psutil
import pytest
from fake_srun import free_job_id
from launching import wait_for
from several import flags_for
from train_runs import losses

pytestmark = pytest.mark.slow  # compiles the updates for eight devices on three meshes
STEPS = 16
MESH = "--config.mesh.data=2", "--config.mesh.fsdp=4"
OTHER = "--config.mesh.data=1", "--config.mesh.fsdp=8"


def status(workdir) -> dict:
    return json.loads((workdir / "status.json").read_text())


@pytest.fixture
def job(bench, config):
    """(workdir, tasks, arguments of train...) -> a job of eight devices in all."""
    bench.program("gadjax", f'exec {sys.executable} -m gadjax "$@"')
    bench.programs("scontrol")
    bench.real_srun()

    def start(workdir, tasks, *arguments):
        given = {"SLURM_NTASKS": tasks, "SLURM_NTASKS_PER_NODE": tasks, "DEVICES": 8}
        given |= {"SLURM_JOB_ID": free_job_id(), "FAKE_SRUN_PID": bench.folder / "srun.pid"}
        given |= {"CONFIG": f"{config}:tdm", "WORKDIR": workdir, "LOGS": bench.folder / "logs"}
        given |= {
            "XLA_FLAGS": flags_for(8 // tasks),
            "JAX_PLATFORMS": "cpu",
            "GADJAX_PEER_TIMEOUT": 10,
        }
        given |= {key: os.environ[key] for key in os.environ if key.startswith(("JAX_", "OMP_"))}
        more = f"--config.steps={STEPS}", "--config.checkpoint.every=2"
        return bench.start("slurm.sbatch", *more, *arguments, **given)

    return start


def ended(job) -> tuple[int, str]:
    out, err = job.communicate(timeout=600)
    print(out, err)
    return job.returncode, out + err


def reached(workdir, step: int, job):
    def there():
        assert job.poll() is None, job.communicate()
        return max(losses(workdir), default=0) >= step

    wait_for(there, 500)


def requeued(bench) -> int:
    return sum(call[:2] == ["scontrol", "requeue"] for call in bench.calls)


def test_a_job_preempted_killed_and_moved_ends_as_an_uninterrupted_one(bench, job, tmp_path):
    workdir = tmp_path / "run"
    first = job(workdir, 2, *MESH)
    reached(workdir, 2, first)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    begin = time.monotonic()
    code, output = ended(first)
    took = time.monotonic() - begin
    assert code == 0 and requeued(bench) == 1, output
    saved = status(workdir)["step"]
    assert status(workdir)["text"] == f"preempted at step {saved}" and saved < STEPS - 6
    print(f"TERM: saved and left {took:.1f} s later")

    second = job(workdir, 2, *MESH)
    reached(workdir, saved + 3, second)
    srun = psutil.Process(int((tmp_path / "srun.pid").read_text()))
    trains = [p for p in srun.children(recursive=True) if "train" in p.cmdline()[2:4]]
    assert len(trains) == 2
    trains[1].kill()
    begin = time.monotonic()
    code, output = ended(second)
    print(f"KILL: the job ended {time.monotonic() - begin:.1f} s later with {code}")
    assert code not in (0, 2) and "was killed by SIGKILL" in output

    third = job(workdir, 1, *OTHER)
    assert ended(third)[0] == 0
    assert status(workdir)["text"] == "done"

    alone = tmp_path / "alone"
    assert ended(job(alone, 1, *MESH))[0] == 0
    restarted, uninterrupted = losses(workdir), losses(alone)
    assert restarted.keys() == uninterrupted.keys() == set(range(1, STEPS + 1))
    apart = np.array([restarted[k] / uninterrupted[k] - 1 for k in restarted])
    print(f"losses of {STEPS} steps differ by at most {np.abs(apart).max():.1e}")
    np.testing.assert_allclose(apart, 0, atol=1e-3)
