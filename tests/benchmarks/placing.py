"""What a TPU program takes, as soon as its buffers have their places and before its code is made.

Three quarters of compiling a plan's updates is code generation after that point. `placed` stands in
for `Programs.compile` and reads what XLA writes down there (`--xla_dump_to`); the numbers are those
of the finished program. The compiling that nobody waits for goes on: end the process.
"""

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gadjax.plan.programs import BATCHES_ON_CHIP, Compiled, Log, Programs, bytes_per_chip

ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*)", re.MULTILINE)
compile_whole = Programs.compile


def dump_to(folder: Path) -> None:
    """Has XLA write its reports; before JAX starts."""
    flags = os.environ.get("XLA_FLAGS", ""), f"--xla_dump_to={folder}", "--xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = " ".join(flags)


def placed(folder: Path, programs: Programs, name: str, batch: int, log: Log) -> Compiled:
    """`programs.compile(name, batch, say)`, earlier where `folder` tells; once for a folder."""
    start, before = time.perf_counter(), None
    whole = ThreadPoolExecutor(1).submit(compile_whole, programs, name, batch, log)
    while not whole.done():
        time.sleep(1)
        found = reports(folder, name)
        if found and found == before:  # written to the end
            text, assignment = found
            extra = (BATCHES_ON_CHIP - 1) * sum(map(bytes_per_chip, programs.raw(batch).values()))
            peak, arguments, temporary = sizes_of(assignment)
            seconds = time.perf_counter() - start
            fits = peak + extra <= programs.where.chip.memory
            return Compiled(fits, peak + extra, arguments, temporary, text, seconds)
        before = found
    return whole.result()


def reports(folder: Path, name: str) -> tuple[str, str] | None:
    """The HLO of an update's program and where its buffers are, once they are there."""
    found = [
        next(folder.glob(f"*jit_{name}_step.*after_optimizations{what}.txt"), None)
        for what in ("", "-buffer-assignment", "-memory-usage-report")
    ]
    return tuple(path.read_text() for path in found[:2]) if all(found) else None


def sizes_of(assignment: str) -> tuple[int, int, int]:
    """Bytes in a chip's main memory: all, arguments, temporaries."""
    arguments = temporary = results = 0
    for size, what in ALLOCATION.findall(assignment):
        if "color" in what:  # another memory: the host's, or a core's own
            continue
        if " parameter " in what:
            arguments += int(size)
        elif "preallocated-temp" in what:
            temporary += int(size)
        elif "maybe-live-out" in what or "output shape" in what:
            results += int(size)
    return arguments + temporary + results, arguments, temporary
