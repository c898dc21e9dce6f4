"""Multi-process runs: initialization, consistency checks, lost peers, preemption, heartbeats."""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gadjax.errors import InputError, RunStopped
from gadjax.io.storage import write_atomic

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = "GADJAX_HEARTBEAT"  # path of the heartbeat file, which the supervisor reads
PEER_TIMEOUT = "GADJAX_PEER_TIMEOUT"  # seconds without a heartbeat until a peer counts as lost
# Errors of jax.distributed.initialize without a cluster, and after JAX has used its devices.
NO_CLUSTER_MESSAGES = "coordinator_address should be defined", "must be called before"
# Parts of JAX's errors in a collective operation or RPC whose peer is gone.
LOST_PEER_MESSAGES = "Gloo", "NCCL", "heartbeat timeout", "coordination service"
PACKAGES = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"
T = TypeVar("T")


def initialize_distributed() -> None:
    """Initialize jax.distributed, before JAX touches a device.

    With JAX_NUM_PROCESSES set, the coordinator is JAX_COORDINATOR_ADDRESS and this process is
    JAX_PROCESS_ID. Otherwise JAX detects the cluster (SLURM, Open MPI, TPU pods). Without a cluster
    the run has a single process and opens no port. From here on SIGUSR2 prints the stacks of all
    threads.

    Raises:
        InputError: variables are missing or wrong, or SLURM tasks would leave GPUs idle.
        RunStopped: the other processes do not connect.
    """
    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True)
    if jax.distributed.is_initialized():
        return
    _check_slurm()
    options = {"heartbeat_timeout_seconds": _environment_int(PEER_TIMEOUT, "100")}
    if COUNT in os.environ:
        if ADDRESS not in os.environ:
            raise InputError(f"{ADDRESS}: found nothing; expected HOST:PORT together with {COUNT}")
        count, number = _environment_int(COUNT), _environment_int(NUMBER)
        if not 0 <= number < count:
            raise InputError(f"{NUMBER}: found {number}; expected 0 to {count - 1}")
        options |= {
            "num_processes": count,
            "process_id": number,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        if COUNT in os.environ or not any(text in str(error) for text in NO_CLUSTER_MESSAGES):
            text = " ".join(str(error).split())[:300]
            raise RunStopped(f"the processes did not find each other: {text}") from error


def is_single_process() -> bool:
    """Return True if the run has no other process."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def _environment_int(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise InputError(f"{name}: found {text!r}; expected a whole number")
    return int(text)


def _check_slurm() -> None:
    """Refuse fewer SLURM tasks than GPUs on a node: JAX would use one GPU a task, by its number.

    Raises: InputError.
    """
    variable = os.environ.get
    cards, tasks = variable("SLURM_GPUS_ON_NODE", ""), variable("SLURM_STEP_TASKS_PER_NODE", "")
    tasks = tasks.split("(")[0].split(",")[0]
    if "SLURM_LOCALID" not in os.environ or not (cards.isdecimal() and tasks.isdecimal()):
        return
    if int(tasks) < int(cards) and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        raise InputError(
            f"SLURM: found {tasks} tasks on a node of {cards} GPUs, of which JAX would use "
            f"{tasks}; expected a task for each GPU (--ntasks-per-node={cards}), or "
            "JAX_LOCAL_DEVICE_IDS=0,1,..."
        )


def check_devices(expected: int | None) -> None:
    """Check the number of devices of all processes in total. Raises: InputError."""
    count, processes = jax.device_count(), jax.process_count()
    if expected is not None and count != expected:
        raise InputError(
            f"--devices: found {count} in {processes} process{'es' * (processes > 1)}; expected "
            f"{expected} (was the command started on every host?)"
        )


def check_same_on_all(config: dict, workdir: Path) -> None:
    """Check that all processes run the same config, workdir, code and packages, by checksums.

    Raises: InputError on every process if one differs.
    """
    if is_single_process():
        return
    contents = {
        "another config": json.dumps(config, sort_keys=True),
        "another workdir": str(workdir),
        "other code of gadjax": _source_code(),
        "other packages": str([version(name) for name in PACKAGES]),
    }
    checksums = np.array([zlib.crc32(text.encode()) for text in contents.values()], np.uint32)
    for number, peer_checksums in enumerate(multihost_utils.process_allgather(checksums)):
        for name, same in zip(contents, peer_checksums == checksums, strict=True):
            if not same:
                raise InputError(
                    f"process {number}: found {name} than on process {jax.process_index()}; "
                    "expected all processes to run the same"
                )


def _source_code() -> str:
    folder = Path(__file__).parents[1]
    tables = folder.glob("ops/*.json")  # of tile sizes: another program for each
    return "".join(path.read_text() for path in sorted([*folder.rglob("*.py"), *tables]))


def run_on_all_processes(f: Callable[[], T]) -> T:
    """Run f on every process; if it fails on one, all raise an error of that kind and none hangs.

    Raises: InputError or RunStopped, the exceptions of f that are exchanged.
    """
    if is_single_process():
        return f()
    error = result = None
    try:
        result = f()
    except (InputError, RunStopped) as failure:
        error = failure
    kinds = (InputError, RunStopped)
    code = 0 if error is None else 1 + kinds.index(type(error))
    codes = multihost_utils.process_allgather(np.int32(code))
    if error is not None:
        raise error
    if codes.any():
        number = int(np.argmax(codes > 0))
        raise kinds[codes[number] - 1](
            f"process {number} ended before training; its log has the reason"
        )
    return result


@contextmanager
def abort_on_lost_peer() -> Iterator[None]:
    """Abort this process if an update or a save fails because a peer process is gone.

    JAX does the same when it notices the loss between updates: anything else this process began
    would wait for the others. status.json stays as it is, so that launchers restart the run.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, RunStopped) as error:
        cause = error.__cause__ or error
        if not is_lost_peer(cause):
            raise
        text = " ".join(str(cause).split())
        print(f"gadjax: a peer was lost: {text[:200]}", file=sys.stderr, flush=True)
        os.abort()


def is_lost_peer(error: BaseException) -> bool:
    """Return True if the error means that a peer is gone; no collective operation works then."""
    return not is_single_process() and any(name in str(error) for name in LOST_PEER_MESSAGES)


def any_process(value: bool) -> bool:
    """Return True if `value` is True on any process (an all-gather)."""
    return (
        value
        if is_single_process()
        else bool(multihost_utils.process_allgather(np.bool_(value)).any())
    )


def broadcast_from_first(value: int) -> int:
    """Broadcast the int `value` of process 0 to every process."""
    return (
        value if is_single_process() else int(multihost_utils.broadcast_one_to_all(np.int32(value)))
    )


class PreemptionHandler:
    """Context that turns SIGTERM, SIGUSR1 or SIGINT into a request to save and exit.

    A second signal of the same kind ends the process as usual. With several processes JAX's
    preemption sync point decides: whichever of them got the signal, all save at the same step.
    """

    def __enter__(self) -> "PreemptionHandler":
        self.stop_requested = False
        self.is_distributed = jax.distributed.is_initialized()
        kinds = [signal.SIGUSR1, signal.SIGINT] + [signal.SIGTERM] * (not self.is_distributed)
        if threading.current_thread() is not threading.main_thread():
            kinds = []  # only the main thread handles signals; its owner ends this run
        self.previous_handlers = {kind: signal.signal(kind, self._request_stop) for kind in kinds}
        return self

    def _request_stop(self, number, frame):
        self.stop_requested = True
        signal.signal(number, signal.SIG_DFL)
        if self.is_distributed:
            os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self, step: int) -> bool:
        """Return True if the run should save and exit after this step; call once a step."""
        if self.is_distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.stop_requested

    def __exit__(self, *error) -> None:
        for kind, handler in self.previous_handlers.items():
            signal.signal(kind, handler)


def write_heartbeat(step: int) -> None:
    """Write the supervisor's heartbeat file (JSON: step, Unix time) at the start of a step."""
    if path := os.environ.get(HEARTBEAT):
        write_atomic(Path(path), json.dumps({"step": step, "time": time.time()}))
