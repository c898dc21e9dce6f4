"""The processes of one run: how they find each other, agree, and leave together."""

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
HEARTBEAT = "GADJAX_HEARTBEAT"  # a file that the supervisor reads
PATIENCE = "GADJAX_PEER_TIMEOUT"  # seconds without a word until a peer counts as lost
# What JAX says where there is no cluster, and in a program that has used its devices already.
ALONE = "coordinator_address should be defined", "must be called before"
# What JAX says of what another process was to take part in.
LOST = "Gloo", "NCCL", "heartbeat timeout", "coordination service"
PACKAGES = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"
T = TypeVar("T")


def join() -> None:
    """Find the other processes of this run, before JAX touches a device.

    Where JAX_NUM_PROCESSES is set: those at JAX_COORDINATOR_ADDRESS, this one being
    JAX_PROCESS_ID. Else whatever JAX detects (SLURM, Open MPI, TPU pods). Nowhere: a run of one
    process, which opens no port. From here on SIGUSR2 prints the stacks of all threads.
    Raises: InputError for variables that are missing or wrong, and for SLURM tasks that would
    leave GPUs idle; RunStopped where the others do not come.
    """
    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True)
    if jax.distributed.is_initialized():
        return
    _check_slurm()
    options = {"heartbeat_timeout_seconds": _whole(PATIENCE, "100")}
    if COUNT in os.environ:
        if ADDRESS not in os.environ:
            raise InputError(f"{ADDRESS}: found nothing; expected HOST:PORT beside {COUNT}")
        count, number = _whole(COUNT), _whole(NUMBER)
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
        if COUNT in os.environ or not any(text in str(error) for text in ALONE):
            text = " ".join(str(error).split())[:300]
            raise RunStopped(f"the processes did not find each other: {text}") from error


def is_single_process() -> bool:
    """Whether this process is all of the run."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def _whole(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise InputError(f"{name}: found {text!r}; expected a whole number")
    return int(text)


def _check_slurm() -> None:
    """Raises: InputError for one task on a node of several GPUs, where JAX would take the one
    whose number is the task's and leave the others idle."""
    here = os.environ.get
    cards, tasks = here("SLURM_GPUS_ON_NODE", ""), here("SLURM_STEP_TASKS_PER_NODE", "")
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
    """Raises: InputError where all processes together have another number of devices."""
    found, processes = jax.device_count(), jax.process_count()
    if expected is not None and found != expected:
        raise InputError(
            f"--devices: found {found} in {processes} process{'es' * (processes > 1)}; expected "
            f"{expected} (was the command started on every host?)"
        )


def check_same_on_all(config: dict, workdir: Path) -> None:
    """Raises: InputError on every process where one runs another config, code or packages."""
    if is_single_process():
        return
    texts = {
        "another config": json.dumps(config, sort_keys=True),
        "another workdir": str(workdir),
        "other code of gadjax": _code(),
        "other packages": str([version(name) for name in PACKAGES]),
    }
    mine = np.array([zlib.crc32(text.encode()) for text in texts.values()], np.uint32)
    for number, theirs in enumerate(multihost_utils.process_allgather(mine)):
        for name, same in zip(texts, theirs == mine, strict=True):
            if not same:
                raise InputError(
                    f"process {number}: found {name} than on process {jax.process_index()}; "
                    "expected all processes to run the same"
                )


def _code() -> str:
    folder = Path(__file__).parents[1]
    return "".join(path.read_text() for path in sorted(folder.rglob("*.py")))


def run_on_all_processes(f: Callable[[], T]) -> T:
    """f() on every process. Where it fails on one, all end as that one does, none waiting."""
    if is_single_process():
        return f()
    error = found = None
    try:
        found = f()
    except (InputError, RunStopped) as failure:
        error = failure
    kinds = (InputError, RunStopped)
    code = 0 if error is None else 1 + kinds.index(type(error))
    codes = multihost_utils.process_allgather(np.int32(code))
    if error is not None:
        raise error
    if codes.any():
        number = int(np.argmax(codes > 0))
        raise kinds[codes[number] - 1](f"process {number} ended before training; its log says why")
    return found


@contextmanager
def abort_on_lost_peer() -> Iterator[None]:
    """Where an update or a save fails because another process is gone, this one says so and aborts,
    as JAX makes it do where the loss is noticed between updates: whatever else it began would wait
    for the others. status.json stays as it is, so that launchers start the run again."""
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
    """Whether it says that another process is gone, with which nothing can be agreed."""
    return not is_single_process() and any(name in str(error) for name in LOST)


def any_process(value: bool) -> bool:
    """Whether it is so on any process."""
    return (
        value
        if is_single_process()
        else bool(multihost_utils.process_allgather(np.bool_(value)).any())
    )


def broadcast_from_first(value: int) -> int:
    """Process 0's value, on every process."""
    return (
        value if is_single_process() else int(multihost_utils.broadcast_one_to_all(np.int32(value)))
    )


class PreemptionHandler:
    """Turns SIGTERM, SIGUSR1 or SIGINT into a request to save and leave.

    A second signal of a kind ends the process as usual. Of several processes JAX's own notice is
    taken, which finds a step at which all of them save, whichever of them was told.
    """

    def __enter__(self) -> "PreemptionHandler":
        self.told = False
        self.shared = jax.distributed.is_initialized()
        kinds = [signal.SIGUSR1, signal.SIGINT] + [signal.SIGTERM] * (not self.shared)
        if threading.current_thread() is not threading.main_thread():
            kinds = []  # signals are the main thread's: whoever has it ends this one
        self.before = {kind: signal.signal(kind, self._tell) for kind in kinds}
        return self

    def _tell(self, number, frame):
        self.told = True
        signal.signal(number, signal.SIG_DFL)
        if self.shared:
            os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self, step: int) -> bool:
        """Whether to save and leave after this step; to be asked once a step."""
        if self.shared:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.told

    def __exit__(self, *error) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


def write_heartbeat(step: int) -> None:
    """Tell a supervisor that a step was begun."""
    if path := os.environ.get(HEARTBEAT):
        write_atomic(Path(path), json.dumps({"step": step, "time": time.time()}))
