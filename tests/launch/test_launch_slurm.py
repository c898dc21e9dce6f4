"""slurm.sbatch: refusals, requeueing, and real processes connected by SLURM's variables."""

import json
import os
import signal
import sys

import pytest
from fake_srun import free_job_id
from launching import (
    CHANGES,
    JOB,
    LOOP,
    ROOT,
    put_status,
    status,
    wait_for,
)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1}, "SLURM_NTASKS_PER_NODE: found 1 tasks"),
        ({"SLURM_NTASKS_PER_NODE": "", "SLURM_TASKS_PER_NODE": "1(x2)"}, "found 1 tasks"),
        ({"SLURM_GPUS_ON_NODE": ""}, "SLURM_GPUS_ON_NODE: found nothing"),
        ({"SLURM_GPUS_PER_TASK": 1}, "SLURM_GPUS_PER_TASK: found 1"),
        ({"DEVICES": 8}, "DEVICES: found 8; expected 16"),
    ],
)
def test_slurm_refuses_gpus_left_idle(bench, change, word):
    bench.programs("srun", "gadjax")
    _, err = bench.run("slurm.sbatch", code=2, WORKDIR="w", SLURM_JOB_ID=7, **(JOB | change))
    assert word in err and err.count("\n") == 1 and bench.calls == []


def test_slurm_accepts_a_task_with_device_ids(bench):
    one = {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1, "JAX_LOCAL_DEVICE_IDS": "0,1,2,3,4,5,6,7"}
    out, _ = bench.run("slurm.sbatch", "--dry-run", WORKDIR="w", **(JOB | one))
    assert "--devices 16" in out


def test_slurm_needs_the_projects_root(bench):
    _, err = bench.run("slurm.sbatch", code=2, SLURM_SUBMIT_DIR=bench.folder, WORKDIR="w", **JOB)
    assert "SLURM_SUBMIT_DIR" in err


def slurm(bench, code: int, **variables):
    """slurm.sbatch as SLURM runs it, one process being all of the job."""
    bench.program("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    bench.programs("scontrol")
    given = JOB | {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": 7, "WORKDIR": bench.folder / "run"}
    bench.run("slurm.sbatch", code=code, **(given | variables))
    return [call for call in bench.calls if call[0] == "scontrol"]


@pytest.mark.parametrize("before, after, code, pod_code", CHANGES)
def test_slurm_requeues_runs_that_should_restart(bench, before, after, code, pod_code):
    put_status(bench, bench.folder / "run", before, after, code)
    called = slurm(bench, 3 if pod_code == 3 else code)
    assert called == ([["scontrol", "requeue", "7"]] if pod_code == 143 else [])


def test_slurm_requeues_no_more_than_max_restarts(bench):
    put_status(bench, bench.folder / "run", None, ("preempted", 1), 0)
    assert slurm(bench, 0, SLURM_RESTART_COUNT=20) == []
    assert len(slurm(bench, 0, SLURM_RESTART_COUNT=20, MAX_RESTARTS=21)) == 1


def test_slurm_leaves_requeueing_to_slurm_where_it_ends_the_job(bench):
    workdir = bench.folder / "run"
    put_status(bench, workdir, None, ("preempted", 1), 0)
    # TERM to the batch shell, which is what started srun.
    bench.program("srun", f"kill -TERM $PPID; sleep 0.1; {bench.bin}/gadjax")
    bench.programs("scontrol")
    given = JOB | {"SLURM_JOB_ID": 7, "WORKDIR": workdir}
    out, _ = bench.run("slurm.sbatch", **given)
    assert "SLURM ends this job itself" in out
    assert [call[0] for call in bench.calls] == ["srun", "gadjax"]


def test_slurm_passes_the_environment_on(bench):
    bench.program("gadjax", "echo $NCCL_SOCKET_IFNAME $NCCL_DEBUG $XLA_FLAGS", "export -p >&2")
    bench.program("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    given = JOB | {"SLURM_JOB_ID": 7, "WORKDIR": bench.folder / "run"}
    variables = {"NCCL_SOCKET_IFNAME": "ib0", "XLA_FLAGS": "--xla_a"}
    out, err = bench.run("slurm.sbatch", **given, **variables)
    assert "ib0 WARN --xla_a" in out
    assert 'XLA_PYTHON_CLIENT_MEM_FRACTION="0.9"' in err
    assert f'JAX_COMPILATION_CACHE_DIR="{bench.folder}/compiled"' in err


def test_two_tasks_save_on_term_and_are_requeued(bench):
    """Real processes, but bash; JAX's are below, training's in test_rehearsal.py."""
    workdir, place = bench.folder / "run", bench.folder / "srun.pid"
    status(workdir, "running")
    save = f"""trap 'echo saved $SLURM_PROCID
[ $SLURM_PROCID = 1 ] || echo {{\\"status\\": \\"preempted\\"}} > {workdir}/status.json
exit 0' TERM"""
    ready = f"echo > {bench.folder}/ready-$SLURM_PROCID"
    bench.program("gadjax", save, ready, LOOP)
    bench.programs("scontrol")
    bench.real_srun()
    two = {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 2, "SLURM_GPUS_ON_NODE": 2}
    given = JOB | two | {"SLURM_JOB_ID": 7, "WORKDIR": workdir, "FAKE_SRUN_PID": place}
    job = bench.start("slurm.sbatch", **given)
    wait_for(lambda: len(list(bench.folder.glob("ready-*"))) == 2 and place.exists())
    os.kill(int(place.read_text()), signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert job.returncode == 0, (out, err)
    assert "saved 0" in out and "saved 1" in out
    assert bench.calls[-1] == ["scontrol", "requeue", "7"]


def test_one_bad_task_ends_the_others(bench):
    workdir = bench.folder / "run"
    bench.program("gadjax", "[ $SLURM_PROCID = 1 ] && exit 2", LOOP)
    bench.programs("scontrol")
    bench.real_srun()
    two = {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 2, "SLURM_GPUS_ON_NODE": 2}
    bench.run("slurm.sbatch", code=137, **(JOB | two | {"SLURM_JOB_ID": 7, "WORKDIR": workdir}))
    assert "scontrol" not in [call[0] for call in bench.calls]


JOINS = """
import json, os, sys
from pathlib import Path
import jax
jax.distributed.initialize()
from jax.experimental.multihost_utils import process_allgather
import numpy as np
ranks = process_allgather(np.array(jax.process_index())).tolist()
workdir = Path(sys.argv[sys.argv.index("--workdir") + 1])
devices = int(sys.argv[sys.argv.index("--devices") + 1])
if jax.process_index() == 0:
    workdir.mkdir()
    found = {"ranks": ranks, "right": devices == jax.device_count(), "status": "preempted"}
    (workdir / "status.json").write_text(json.dumps(found))
"""


def test_jax_joins_the_tasks_by_slurms_variables(bench):
    """slurm.sbatch, two real processes, JAX's own detection; requeued as preempted."""
    workdir, joins = bench.folder / "run", bench.folder / "joins.py"
    joins.write_text(JOINS)
    bench.program("gadjax", f'exec {sys.executable} {joins} "$@"')
    bench.programs("scontrol")
    bench.real_srun()
    two = {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 2, "SLURM_JOB_ID": free_job_id()}
    cpu = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": 1, "WORKDIR": workdir}
    bench.run("slurm.sbatch", CONFIG="c.py", **two, **cpu)
    record = json.loads((workdir / "status.json").read_text())
    assert record == {"ranks": [0, 1], "right": True, "status": "preempted"}
    assert bench.calls[-1] == ["scontrol", "requeue", str(two["SLURM_JOB_ID"])]
