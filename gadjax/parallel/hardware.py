"""Hardware tables: chips, peak FLOP/s, and topologies for ahead-of-time compilation."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from gadjax.errors import InputError
from gadjax.parallel import libtpu

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One JAX device. memory: bytes available to a program. peak: bfloat16 FLOP/s."""

    name: str
    memory: float
    peak: float


# TPUs: the memory that XLA's compiler grants a program; peaks as Google publishes them. A tpu7x has
# two JAX devices, with half of its peak and memory each. GPUs: about what the driver leaves; dense
# peaks of the SXM cards as NVIDIA publishes them.
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
# jax.Device.device_kind -> chip. Other form factors of a card, with other clocks, are left out.
DEVICE_KINDS = {
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
SHAPES_2D = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split()
SHAPES_3D = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16".split()
# Chip -> topologies for which libtpu is known to compile.
TOPOLOGIES = {
    "v4": SHAPES_3D[:8],
    "v5e": SHAPES_2D,
    "v5p": SHAPES_3D,
    "v6e": SHAPES_2D,
    "tpu7x": SHAPES_3D[:5],
}
GPUS = [name for name in CHIPS if name not in TOPOLOGIES]
DEFAULT_GPU = "h100"  # for "gpu:COUNT"
CUDA_PLUGINS = "jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"  # jax[cuda13], jax[cuda12]
GPUS_PER_NODE = 8
# XLA's target configuration where no card is there to query (OpenXLA's target_config/specs): major
# compute capability, multiprocessors, float32 units, shared memory and shared memory per block of
# each multiprocessor (bytes), L2 and device memory (bytes), bandwidth (bytes per second).
TARGETS = {
    "a100-40": (8, 108, 64, 167936, 166912, 41943040, 42331013120, 1555200000000),
    "a100-80": (8, 108, 64, 167936, 166912, 41943040, 85100068864, 2039040000000),
    "h100": (9, 132, 128, 233472, 232448, 52428800, 84942979072, 3352320000000),
    "h200": (9, 132, 128, 233472, 232448, 52428800, 151397597184, 4800000000000),
    "b200": (10, 148, 128, 233472, 232448, 132644864, 191514411008, 7672320000000),
}
TARGET_TEMPLATE = """
gpu_device_info {{
  cuda_compute_capability {{ major: {} }}
  core_count: {}
  fpus_per_core: {}
  shared_memory_per_core: {}
  shared_memory_per_block_optin: {}
  l2_cache_size: {}
  device_memory_size: {}
  memory_bandwidth: {}
  shared_memory_per_block: 49152
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.5
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{}"
"""
DEVICES_PER_CHIP = {"tpu7x": 2}  # JAX devices per chip, where more than one
NON_TPU_FLAGS = "--xla_cpu_", "--xla_gpu_"  # prefixes of XLA flags that libtpu does not know


@dataclass(frozen=True)
class Topology:
    """Topology to compile for.

    Args:
      name: as the user gave it.
      chip: of all its devices.
      count: number of JAX devices.
      estimate: CPUs stand in for the chips.
    """

    name: str
    chip: Chip
    count: int
    estimate: bool

    def devices(self) -> list[Any]:
        """Devices to compile for. Raises: InputError where no compiler for them is installed."""
        if self.chip.name in GPUS:
            return _cpus(self.count) if self.estimate else _gpus(self)
        return _tpus(self.name)


def find_topology(name: str) -> Topology:
    """Parse a topology: "v5e:4x4", "2*v5e:4x4" for two slices, or "h100:8" ("gpu:8" is the same).

    GPUs are an estimate without JAX's CUDA plugin, which compiles for them without a card.

    Raises: InputError for an unknown topology.
    """
    slices, kind, size = re.fullmatch(r"(?:([1-9][0-9]?)\*)?([^:]*):?(.*)", name).groups()
    if size in TOPOLOGIES.get(kind, ()):
        count = math.prod(map(int, size.split("x"))) * DEVICES_PER_CHIP.get(kind, 1)
        return Topology(name, CHIPS[kind], count * int(slices or 1), False)
    card = DEFAULT_GPU if kind == "gpu" else kind
    if card in GPUS and not slices and re.fullmatch("[1-9][0-9]{0,3}", size):
        return Topology(name, CHIPS[card], int(size), not _has_cuda())
    known = "; ".join(f"{kind}: {', '.join(sizes)}" for kind, sizes in TOPOLOGIES.items())
    raise InputError(
        f"--topology: found {name!r}; expected CHIP:SIZE ({known}), several slices of one as "
        f"2*CHIP:SIZE, or CARD:COUNT with one of {', '.join(GPUS)}, or gpu:COUNT"
    )


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by `jax.Device.device_kind`; None where it is unknown."""
    return CHIPS[DEVICE_KINDS[device_kind]].peak if device_kind in DEVICE_KINDS else None


def _tpus(name: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology: found no libtpu, which compiles for {name}; expected it (pip install "
            "libtpu)"
        )
    for key, value in libtpu.QUIET_ENV.items():
        os.environ.setdefault(key, value)
    # libtpu ends the process over a flag that it does not know.
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(f for f in flags if not f.startswith(NON_TPU_FLAGS))
    from jax.experimental import topologies

    # A v4 is one JAX device only in megacore mode.
    slices, _, one = name.rpartition("*")
    options = {"chip_config_name": "megacore"} if one.startswith("v4:") else {}
    if slices:
        options["num_slices"] = int(slices)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=one, **options)
    except Exception as error:  # libtpu documents no exception type
        raise InputError(
            f"--topology: found a libtpu that does not know {name} ({' '.join(str(error).split())})"
            "; expected one that does (pip install -U libtpu)"
        ) from error
    return list(topology.devices)


def _has_cuda() -> bool:
    parent, *_ = CUDA_PLUGINS[0].partition(".")
    if importlib.util.find_spec(parent) is None:
        return False
    return any(importlib.util.find_spec(name) for name in CUDA_PLUGINS)


def _gpus(where: Topology) -> list[Any]:
    from jax.experimental import topologies

    kind = next(kind for kind, name in DEVICE_KINDS.items() if name == where.chip.name)
    nodes, rest = divmod(where.count, GPUS_PER_NODE)
    shape = f"1x{nodes}x{GPUS_PER_NODE}" if nodes and not rest else f"1x1x{where.count}"
    target = TARGET_TEMPLATE.format(*TARGETS[where.chip.name], kind)
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=shape
        )
    except Exception as error:  # the plugin documents no exception type
        raise InputError(
            f"--topology: found a CUDA plugin of JAX that does not compile for {where.name} "
            f"without a card ({' '.join(str(error).split())}); expected one that does (pip install "
            "-U 'jax[cuda12]'), or none for an estimate"
        ) from error
    return list(topology.devices)


def _cpus(count: int) -> list[Any]:
    try:
        if jax.config.jax_num_cpu_devices < count:
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend is initialised already; the number of CPUs is fixed
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"--topology: found a JAX that was in use already, with {len(devices)} CPU devices; "
            f"expected {count}, one for each card (plan in a process of its own)"
        )
    return devices[:count]
