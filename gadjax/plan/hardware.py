"""Chips and topologies that a run can be planned for, without having them."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from gadjax.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What JAX calls a device. memory: bytes that a program may use. peak: bfloat16 FLOP/s."""

    name: str
    memory: float
    peak: float


# TPUs: the memory that XLA's compiler itself gives a program; the peaks that Google publishes. A
# tpu7x has two chips in this sense, with half of the peak and memory each. GPUs: about what the
# driver leaves; dense peaks of the SXM cards that NVIDIA publishes.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 30.75 * GIB, 275e12),
        Chip("v5e", 15.75 * GIB, 197e12),
        Chip("v5p", 95.73 * GIB, 459e12),
        Chip("v6e", 31.24 * GIB, 918e12),
        Chip("tpu7x", 94.74 * GIB, 1153.5e12),
        Chip("a100-40", 39 * GIB, 312e12),
        Chip("a100-80", 79 * GIB, 312e12),
        Chip("h100", 79 * GIB, 989e12),
        Chip("h200", 139 * GIB, 989e12),
        Chip("b200", 178 * GIB, 2250e12),
    )
}
# As devices name themselves to JAX. Cards of another form, with other clocks, are not among them.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split()
SOLID = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16".split()
# Chip -> the sizes in which it is known to load.
TOPOLOGIES = {
    "v4": SOLID[:8],
    "v5e": FLAT,
    "v5p": SOLID,
    "v6e": FLAT,
    "tpu7x": SOLID[:5],
}
CARDS = [name for name in CHIPS if name not in TOPOLOGIES]
GPU = "h100"  # what "gpu" means
PER_PLACE = {"tpu7x": 2}  # JAX devices at a place of the topology
# The compiler of a TPU looks for one, and for the others that use it, unless it is told.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
OTHERS = "--xla_cpu_", "--xla_gpu_"  # flags of XLA that are nothing to a TPU


@dataclass(frozen=True)
class Topology:
    """name: as it was asked for. estimate: whether CPUs stand in for the chips."""

    name: str
    chip: Chip
    count: int
    estimate: bool

    def devices(self) -> list[Any]:
        """Devices to compile for. Raises: InputError without libtpu, or without enough CPUs."""
        return _cpus(self.count) if self.estimate else _tpus(self.name)


def find_topology(name: str) -> Topology:
    """ "v5e:4x4", "2*v5e:4x4" for two slices, or "h100:8" ("gpu:8" is the same).

    Raises: InputError for an unknown one.
    """
    slices, kind, size = re.fullmatch(r"(?:([1-9][0-9]?)\*)?([^:]*):?(.*)", name).groups()
    if size in TOPOLOGIES.get(kind, ()):
        count = math.prod(map(int, size.split("x"))) * PER_PLACE.get(kind, 1)
        return Topology(name, CHIPS[kind], count * int(slices or 1), False)
    card = GPU if kind == "gpu" else kind
    if card in CARDS and not slices and re.fullmatch("[1-9][0-9]{0,3}", size):
        return Topology(name, CHIPS[card], int(size), True)
    known = "; ".join(f"{kind}: {', '.join(sizes)}" for kind, sizes in TOPOLOGIES.items())
    raise InputError(
        f"--topology: found {name!r}; expected CHIP:SIZE ({known}), several slices of one as "
        f"2*CHIP:SIZE, or CARD:COUNT with one of {', '.join(CARDS)}, or gpu:COUNT"
    )


def peak_of(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a device by `jax.Device.device_kind`; None where it is not known."""
    return CHIPS[KINDS[device_kind]].peak if device_kind in KINDS else None


def _tpus(name: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology: found no libtpu, which compiles for {name}; expected it (pip install "
            "libtpu)"
        )
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # libtpu ends the process over one that it does not know.
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(f for f in flags if not f.startswith(OTHERS))
    from jax.experimental import topologies

    # A v4 is one device to JAX only where its two cores work as one.
    slices, _, one = name.rpartition("*")
    options = {"chip_config_name": "megacore"} if one.startswith("v4:") else {}
    if slices:
        options["num_slices"] = int(slices)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=one, **options)
    except Exception as error:  # whatever libtpu says of itself
        raise InputError(
            f"--topology: found a libtpu that does not know {name} ({' '.join(str(error).split())})"
            "; expected one that does (pip install -U libtpu)"
        ) from error
    return list(found.devices)


def _cpus(count: int) -> list[Any]:
    try:
        if jax.config.jax_num_cpu_devices < count:
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has begun to compute, with as many as it was told of then
        pass
    found = jax.devices("cpu")
    if len(found) < count:
        raise InputError(
            f"--topology: found a JAX that was in use already, with {len(found)} CPU devices; "
            f"expected {count}, one for each card (plan in a process of its own)"
        )
    return found[:count]
