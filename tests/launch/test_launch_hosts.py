"""Launch scripts on TPU hosts, in pods and on one machine with GPUs."""

import shlex
import shutil
import signal
import subprocess

import pytest
from launching import CHANGES, HOSTILE, JOB, LOOP, VM, put_status, status, train, wait_for

# TPU VMs.


def test_create_passes_spot_and_the_software_of_the_type(bench):
    bench.programs("gcloud")
    bench.run("tpu_vm.sh", "create", "--spot", **VM)
    queued = ["gcloud", "compute", "tpus", "queued-resources", "create", "pixart-1"]
    assert bench.calls[0][:6] == queued
    assert {"--spot", "--node-id=pixart-1", "--runtime-version=v2-alpha-tpuv6e"} <= {
        *bench.calls[0]
    }
    assert (bench.logs / "create.log").read_text() == "gcloud says\n"


def test_several_slices_are_nodes_of_one_resource(bench):
    bench.programs("gcloud")
    bench.run("tpu_vm.sh", "create", **VM, NUM_SLICES=3)
    bench.run("tpu_vm.sh", "train", **VM, NUM_SLICES=3)
    create, started = bench.calls
    assert {"--node-count=3", "--node-prefix=pixart-1"} <= {*create}
    assert not any(flag.startswith("--node-id") for flag in create)
    assert {"--node=all", "--worker=all"} <= {*started}
    command = next(f for f in started if f.startswith("--command=")).removeprefix("--command=")
    assert shlex.split(command)[-2:] == ["--devices", "48"]


@pytest.mark.parametrize("kind", ["tpu7x-16", "v3-8"])
def test_other_tpus_are_sent_to_gke(bench, kind):
    bench.programs("gcloud")
    _, err = bench.run("tpu_vm.sh", "create", code=2, **(VM | {"TPU_TYPE": kind}))
    assert f"found {kind}" in err and "tpu_gke.sh" in err and bench.calls == []


@pytest.mark.parametrize("step", ["create", "install", "train", "status", "stop", "delete"])
def test_the_code_of_gcloud_survives_tee(bench, step):
    bench.programs("gcloud", code=17)
    bench.programs("tar")
    out, _ = bench.run("tpu_vm.sh", step, code=17, **VM)
    assert "gcloud says" in out and (bench.logs / f"{step}.log").exists()


def test_an_unknown_step_is_refused(bench):
    _, err = bench.run("tpu_vm.sh", "creat", code=2, **VM)
    assert "found 'creat'" in err


def test_a_host_trains_until_stop(bench):
    ready = bench.folder / "ready"
    bench.program("gadjax", "trap 'echo saved; exit 3' TERM", f"echo > {ready}", LOOP)
    argv = ["/proc", str(bench.folder / "run"), *train("w", 4, HOSTILE)]
    out, _ = bench.run("tpu_vm.sh", "host", "train", *argv)
    try:
        assert "process" in out
        wait_for(ready.exists)
        _, err = bench.run("tpu_vm.sh", "host", "train", *argv, code=2)
        assert "found a run in progress" in err
        assert "is running" in bench.run("tpu_vm.sh", "host", "status")[0]
        assert "exit code 3" in bench.run("tpu_vm.sh", "host", "stop", "20")[0]
    finally:
        bench.run("tpu_vm.sh", "host", "stop", "20")
    assert len(bench.calls) == 1 and bench.calls[0][:3] == ["gadjax", "launch", "--logs"]
    assert bench.calls[0][5:] == train("w", 4, HOSTILE)


def test_stop_has_patience_and_kills_nothing(bench):
    ready, leave = bench.folder / "ready", bench.folder / "leave"
    wait = f"until [ -e {leave} ]; do sleep 0.05; done"
    bench.program("gadjax", "trap '' TERM", f"echo > {ready}", wait)
    bench.run("tpu_vm.sh", "host", "train", "/proc", str(bench.folder / "run"), "train")
    try:
        wait_for(ready.exists)
        _, err = bench.run("tpu_vm.sh", "host", "stop", "1", code=3)
        assert "still running" in err
        assert "is running" in bench.run("tpu_vm.sh", "host", "status")[0]
    finally:
        leave.touch()
    wait_for(lambda: (bench.folder / ".gadjax/code").exists())
    assert "exit code 0" in bench.run("tpu_vm.sh", "host", "status")[0]


def test_stop_does_not_signal_an_unrelated_process(bench):
    with subprocess.Popen(["sleep", "60"]) as stranger:
        (bench.folder / ".gadjax").mkdir()
        (bench.folder / ".gadjax/pid").write_text(str(stranger.pid))
        assert "no run was started" in bench.run("tpu_vm.sh", "host", "stop", "1")[0]
        assert stranger.poll() is None
        stranger.kill()


def test_hosts_refuse_a_folder_that_is_not_shared(bench):
    bench.programs("gadjax")
    for argv in (["tpu_vm.sh", "host", "train"], ["tpu_gke.sh", "pod"]):
        _, err = bench.run(*argv, str(bench.folder), str(bench.folder / "run"), "train", code=2)
        assert "MOUNT: found nothing mounted" in err
    assert bench.calls == []


# Pods.


@pytest.mark.parametrize("before, after, code, pod_code", CHANGES)
def test_exit_code_of_a_pod_requests_a_restart(bench, before, after, code, pod_code):
    workdir = bench.folder / "run"
    put_status(bench, workdir, before, after, code)
    bench.run("tpu_gke.sh", "pod", "/proc", str(workdir), *train("w", 4, HOSTILE), code=pod_code)
    assert bench.calls[0][:3] == ["gadjax", "launch", "--logs"]
    assert bench.calls[0][5:] == train("w", 4, HOSTILE)


def test_a_pod_asks_a_bucket_how_the_run_stands(bench):
    store = "gs://bucket/runs/pixart"
    bench.programs("gadjax", code=1)
    asked = bench.folder / "asked"
    read = f"""if [ "$2" != 'import gcsfs' ]; then
    echo "status of $3" >> {asked}
    printf '{{"status": "running", "time": %s}}' $(wc -l < {asked})
fi"""
    bench.program("python", read, "exit 0")
    (bench.bin / "wc").symlink_to(shutil.which("wc"))
    bench.run("tpu_gke.sh", "pod", "/nowhere", store, *train(store, 4), code=143)
    assert asked.read_text() == f"status of {store}\n" * 2  # before the run and after it


def test_a_bucket_wants_its_client(bench):
    bench.programs("gadjax")
    bench.programs("python", code=1)
    _, err = bench.run("tpu_gke.sh", "pod", "/nowhere", "gs://bucket/run", "train", code=2)
    assert "gadjax[gcs]" in err and "gadjax" not in [call[0] for call in bench.calls]


def test_a_pod_hands_term_on_and_waits(bench):
    ready, workdir = bench.folder / "ready", bench.folder / "run"
    status(workdir, "running")
    save = f"""trap 'sleep 0.3; echo {{\\"status\\": \\"preempted\\"}} > {workdir}/status.json
exit 0' TERM"""
    bench.program("gadjax", save, f"echo > {ready}", LOOP)
    pod = bench.start("tpu_gke.sh", "pod", "/proc", str(workdir), "train")
    wait_for(ready.exists)
    pod.send_signal(signal.SIGTERM)
    out, err = pod.communicate(timeout=20)
    assert pod.returncode == 143, (out, err)
    assert "exit code 0" in out and "preempted" in out


# One machine of GPUs.


def node(bench, cards: int) -> dict:
    bench.program("nvidia-smi", *["echo NVIDIA H200"] * cards)
    bench.programs("python")
    bench.programs("gadjax", code=3)
    return {"WORKDIR": bench.folder / "run", "CONFIG": JOB["CONFIG"], "DEVICES": 2}


def test_gpu_node_counts_its_cards_and_returns_the_runs_code(bench):
    bench.run("gpu_node.sh", code=3, **node(bench, 2))
    assert [call[0] for call in bench.calls] == ["nvidia-smi", "python", "gadjax"]


def test_gpu_node_refuses_another_count(bench):
    _, err = bench.run("gpu_node.sh", code=2, **node(bench, 1))
    assert "DEVICES: found 2; expected 1" in err and "NVIDIA H200" in err
    assert "gadjax" not in [call[0] for call in bench.calls]


def test_gpu_node_counts_what_is_visible(bench):
    given = node(bench, 4)
    bench.run("gpu_node.sh", code=3, CUDA_VISIBLE_DEVICES="1,3", **given)
    _, err = bench.run("gpu_node.sh", code=2, CUDA_VISIBLE_DEVICES="1", **given)
    assert "expected 1" in err


def test_gpu_node_names_a_jax_without_cuda(bench):
    given = node(bench, 2)
    bench.programs("python", code=1)
    _, err = bench.run("gpu_node.sh", code=2, **given)
    assert "jax[cuda13]" in err and "gadjax" not in [call[0] for call in bench.calls]
