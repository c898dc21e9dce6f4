"""Memory of a TPU program as of buffer assignment, before code generation.

Three quarters of compiling a plan's updates is code generation after that point. `placed` stands in
for `Programs.compile` and reads XLA's reports (`--xla_dump_to`); the numbers are those of the
finished program. The abandoned compilation goes on: end the process.
"""

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gadjax.plan.programs import BATCHES_ON_CHIP, Compiled, Log, Programs, bytes_per_chip

ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*)", re.MULTILINE)
BORDERLINE = 2**26  # bytes to spare, below which the compiler has the last word
compile_fully = Programs.compile


def dump_to(folder: Path) -> None:
    """Make XLA write its reports to `folder`; call it before JAX starts."""
    flags = os.environ.get("XLA_FLAGS", ""), f"--xla_dump_to={folder}", "--xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = " ".join(flags)


def placed(folder: Path, programs: Programs, name: str, batch: int, log: Log) -> Compiled:
    """Result of `programs.compile(name, batch, log)`, earlier where XLA's reports have it.

    Args:
      folder: of the reports; to be used once.
      programs: of the plan.
      name: of the update.
      batch: its samples.
      log: called with a line of text.
    """
    start, before = time.perf_counter(), None
    compilation = ThreadPoolExecutor(1).submit(compile_fully, programs, name, batch, log)
    while not compilation.done():
        time.sleep(1)
        current = reports(folder, name)
        if current and current == before:  # written to the end
            text, assignment = current
            extra = (BATCHES_ON_CHIP - 1) * sum(map(bytes_per_chip, programs.raw(batch).values()))
            peak, arguments, temporary = sizes_of(assignment)
            seconds = time.perf_counter() - start
            spare = programs.target.chip.memory - peak - extra
            if not 0 <= spare < BORDERLINE:
                return Compiled(spare >= 0, peak + extra, arguments, temporary, text, seconds)
        before = current
    return compilation.result()


def reports(folder: Path, name: str) -> tuple[str, str] | None:
    """HLO and buffer assignment of an update's program, once they are written."""
    paths = [
        next(folder.glob(f"*jit_{name}_step.*after_optimizations{what}.txt"), None)
        for what in ("", "-buffer-assignment", "-memory-usage-report")
    ]
    return tuple(path.read_text() for path in paths[:2]) if all(paths) else None


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
