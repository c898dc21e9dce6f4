"""Launch scripts: the commands that they would start, and their refusals."""

import shlex
import subprocess

import pytest
from launching import GKE, HOSTILE, JOB, ROOT, VM, train, without

SCRIPTS = [*ROOT.glob("launch/*.sh"), ROOT / "launch/slurm.sbatch"]
CLUSTER = ["gpu_node.sh", "slurm.sbatch", "tpu_gke.sh", "tpu_vm.sh"]
# env.sh and lib.sh are read by those that source them.
ENTRIES = [path for path in SCRIPTS if path.name not in ("env.sh", "lib.sh")]


def test_shellcheck_finds_nothing():
    checked = subprocess.run(
        ["shellcheck", "-x", "-a", "-P", "SCRIPTDIR", "-P", ROOT, *ENTRIES],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_all_scripts_are_checked():
    assert {path.name for path in ENTRIES} >= {*CLUSTER, "quickstart.sh", "test.sh"}


@pytest.mark.parametrize("script", CLUSTER)
def test_help_is_the_head_of_the_script(bench, script):
    out, _ = bench.run(script, "--help")
    assert "WORKDIR" in out and "Needs hardware" in out and "--dry-run" in out
    assert "#SBATCH" not in out and "set -euo" not in out


# Dry runs.


def test_gke_prints_the_workload_and_runs_nothing(bench):
    bench.programs("xpk", "kubectl", "gcloud", "gadjax")
    out, _ = bench.run("tpu_gke.sh", "--dry-run", HOSTILE, "--config.a=", **GKE)
    argv = shlex.split(out)
    assert argv[:3] == ["xpk", "workload", "create"]
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in argv[3:])
    command = shlex.split(flags.pop("command"))
    assert flags == {
        "workload": "pixart-1",
        "project": "lab",
        "zone": "us-east5-b",
        "cluster": "pods",
        "tpu-type": "v5litepod-16",
        "num-slices": "2",
        "docker-image": "registry/gadjax@sha256:0",
        "max-restarts": "20",
        "termination-grace-period-seconds": "180",
    }
    assert command[:5] == ["exec", "bash", "launch/tpu_gke.sh", "pod", "/gcs"]
    expected = train("gs://bucket/runs/pixart", 32, HOSTILE, "--config.a=")
    expected[2] += ":tdm"
    assert command[5:] == ["gs://bucket/runs/pixart", *expected]
    assert bench.calls == [] and not bench.logs.exists()


@pytest.mark.parametrize("step", ["create", "install", "train", "status", "stop", "delete"])
def test_tpu_vm_prints_its_commands_and_runs_nothing(bench, step):
    bench.programs("gcloud", "tar", "gadjax")
    out, _ = bench.run("tpu_vm.sh", step, "--dry-run", **VM)
    commands = [shlex.split(line) for line in out.splitlines()]
    assert commands and all(argv[0] in ("gcloud", "tar") for argv in commands)
    for argv in commands:
        assert argv[0] == "tar" or {"--project=lab", "--zone=us-east5-b"} <= {*argv}
    assert bench.calls == [] and not bench.logs.exists()


def test_slurm_prints_srun_and_runs_nothing(bench):
    bench.programs("srun", "scontrol", "gadjax")
    workdir = bench.folder / "run"
    out, _ = bench.run(
        "slurm.sbatch", "--dry-run", HOSTILE, WORKDIR=workdir, SLURM_CPUS_PER_TASK=6, **JOB
    )
    argv = shlex.split(out)
    flags = ["--ntasks=16", "--ntasks-per-node=8", "--kill-on-bad-exit=1", "--label"]
    assert argv[:6] == ["srun", *flags, "--cpus-per-task=6"]
    launch = ["gadjax", "launch", "--logs", str(bench.logs), "--"]
    assert argv[6:] == [*launch, *train(workdir, 16, HOSTILE)]
    assert bench.calls == [] and not workdir.exists()


def test_gpu_node_prints_gadjax_and_runs_nothing(bench):
    bench.programs("nvidia-smi", "python", "gadjax")
    workdir = bench.folder / "run"
    out, _ = bench.run(
        "gpu_node.sh", "--dry-run", HOSTILE, WORKDIR=workdir, DEVICES=8, CONFIG=JOB["CONFIG"]
    )
    launch = ["gadjax", "launch", "--processes", "1", "--logs", str(bench.logs), "--"]
    assert shlex.split(out) == [*launch, *train(workdir, 8, HOSTILE)]
    assert bench.calls == []


# What is missing or wrong is named.


def cases(script: str, variables: dict, *steps: str):
    return [(script, steps, variables, key) for key in variables if key != "NUM_SLICES"]


MISSING = [
    *cases("tpu_gke.sh", GKE),
    *cases("tpu_vm.sh", VM, "train"),
    *cases("tpu_vm.sh", without(VM, "WORKDIR", "CONFIG"), "create"),
    *cases("tpu_vm.sh", without(VM, "CONFIG", "TPU_TYPE"), "status"),
    *cases("tpu_vm.sh", without(VM, "CONFIG", "TPU_TYPE", "WORKDIR"), "stop"),
    *cases("gpu_node.sh", {"WORKDIR": "w", "CONFIG": "c", "DEVICES": 8}),
    *cases("slurm.sbatch", {"WORKDIR": "w", "CONFIG": "c", "SLURM_NTASKS": 8}),
]


@pytest.mark.parametrize("script, steps, variables, key", MISSING)
def test_a_missing_variable_is_named(bench, script, steps, variables, key):
    bench.programs("xpk", "kubectl", "gcloud", "srun", "gadjax", "nvidia-smi")
    for given in (without(variables, key), variables | {key: ""}):
        out, err = bench.run(script, *steps, code=2, **given)
        assert err.count("\n") == 1 and f"{key}: found nothing" in err and out == ""
    assert bench.calls == []


def test_all_that_is_missing_is_named_at_once(bench):
    _, err = bench.run("tpu_gke.sh", "--dry-run", code=2)
    assert "PROJECT ZONE CLUSTER TPU_TYPE IMAGE NAME WORKDIR CONFIG: found nothing" in err


@pytest.mark.parametrize(
    "script, steps, variables, tool",
    [("tpu_gke.sh", [], GKE, "xpk"), ("tpu_vm.sh", ["create"], VM, "gcloud")],
)
def test_a_missing_tool_is_named(bench, script, steps, variables, tool):
    _, err = bench.run(script, *steps, code=2, **variables)
    assert f"{tool}: found nothing" in err


@pytest.mark.parametrize(
    "change, word",
    [
        ({"NAME": "Pixart"}, "NAME: found Pixart"),
        ({"NAME": "1pixart"}, "NAME: found"),
        ({"NAME": "pixart-"}, "NAME: found"),
        ({"NAME": "p" * 41}, "NAME: found"),
        ({"WORKDIR": "runs/pixart"}, "WORKDIR: found runs/pixart"),
        ({"WORKDIR": "gs://bucket"}, "WORKDIR: found"),
        ({"NUM_SLICES": "two"}, "NUM_SLICES: found 'two'"),
        ({"TPU_TYPE": "v9-16"}, "TPU_TYPE: found v9-16"),
        ({"TPU_TYPE": "v5p-7"}, "TPU_TYPE: found"),
        ({"DEVICES": 16}, "DEVICES: found 16; expected 32"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS: found"),
    ],
)
def test_gke_refuses(bench, change, word):
    bench.programs("xpk", "kubectl")
    _, err = bench.run("tpu_gke.sh", code=2, **(GKE | change))
    assert word in err and err.count("\n") == 1 and bench.calls == []


@pytest.mark.parametrize(
    "kind, slices, devices",
    [
        ("v4-32", 1, 16),
        ("v5p-128", 1, 64),
        ("v5litepod-16", 3, 48),
        ("v6e-256", 1, 256),
        ("v6e-4x4", 1, 16),
        ("v5p-2x2x4", 2, 32),
        ("tpu7x-16", 1, 16),
        ("tpu7x-2x2x1", 1, 8),
    ],
)
def test_devices_follow_from_the_type(bench, kind, slices, devices):
    given = GKE | {"TPU_TYPE": kind, "NUM_SLICES": slices, "DEVICES": devices}
    out, _ = bench.run("tpu_gke.sh", "--dry-run", **given)
    assert f"--num-slices={slices} " in out and f"--devices\\ {devices}" in out


def test_devices_are_asked_for_where_the_type_is_unknown(bench):
    out, _ = bench.run("tpu_gke.sh", "--dry-run", **(GKE | {"TPU_TYPE": "v9-16", "DEVICES": 5}))
    assert "--devices\\ 5" in out
