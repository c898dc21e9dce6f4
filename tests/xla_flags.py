"""Flags of XLA that the installed one knows: over an unknown flag it ends the process."""

import os
import subprocess
import sys

# Nearly all of the time goes into optimising programs that then run for none.
HURRY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# On the new road this saves a quarter.
PRESET = "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
# Nor need code be split between threads, or operations be ordered so that they may overlap.
ONE_THREAD = (
    "--xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false"
)
# The old road from HLO to LLVM takes half the time; since JAX 0.12 there is only the new one.
OLD_ROAD = "--xla_cpu_use_fusion_emitters=false"


def known(flag: str) -> bool:
    """Asks XLA in a process of its own, which takes half a second."""
    command = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.make_cpu_client()"]
    asked = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flag}, capture_output=True)
    return asked.returncode == 0


def hurried(flags: str) -> str:
    """XLA_FLAGS with those that make it compile quickly; what has them stays as it is."""
    if HURRY in flags:
        return flags
    return " ".join(
        (flags, HURRY, *(f for f in (PRESET, ONE_THREAD, OLD_ROAD) if known(f)))
    ).strip()
