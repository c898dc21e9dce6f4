"""Plan of a run: memory, FLOPs and traffic per chip, from updates compiled ahead of time.

Memory and traffic are read from the programs that XLA compiles, operations from the traced ones; no
parameter is allocated and nothing is computed.
"""

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from gadjax.errors import InputError
from gadjax.ops.flops import flops
from gadjax.parallel.hardware import GIB, Topology, find_topology
from gadjax.parallel.sharding import BATCH_AXES, path_name
from gadjax.plan.lora import start_at_lora
from gadjax.plan.programs import (
    BATCHES_ON_CHIP,
    Compiled,
    Log,
    Programs,
    build_programs,
    bytes_per_chip,
)
from gadjax.plan.traffic import traffic
from gadjax.runtime.settings import pinned_jax_config
from gadjax.seeds import make_key
from gadjax.training.batch import make_batch
from gadjax.training.data import SOURCES
from gadjax.training.setup import Run, prepare
from gadjax.training.steps import UPDATES

MAX_TRIES = 4  # programs compiled in search of the largest batch


@pinned_jax_config()
def plan(
    config: ConfigDict,
    topology: str,
    *,
    lora: Path | None = None,
    utilisation: float = 0.4,
    largest: bool = False,
    log: Log = lambda text: None,
) -> dict[str, Any]:
    """Plan of a run on a topology: everything that `gadjax plan` prints, by name.

    Args:
      config: of the run; a config without data is planned with bundled prompts.
      topology: name of the chips, such as "v5e:4x4" or "h100:8".
      lora: at which the student starts, as `start_at_lora` takes it.
      utilisation: share of the chip's peak FLOP/s that the ceiling on images/s assumes.
      largest: search for the largest batch that fits.
      log: called with a line of text at each compilation.
    Returns: the plan as JSON values; bytes and FLOP/s are a chip's.
    Raises: InputError before anything is compiled, also where the state alone does not fit.
    """
    if not 0 < utilisation <= 1:
        raise InputError(
            f"--utilisation: found {utilisation}; expected a share above 0 and up to 1"
        )
    target = find_topology(topology)
    config = ConfigDict(config)
    if not any(config.data[name] for name in SOURCES):
        config.data.prompts = "asset:shapes_demo_prompts.txt"  # tokens of any prompts are alike
    devices = target.devices()  # for absent cards before JAX starts
    if lora is not None:
        config = start_at_lora(config, lora, log)
    run = prepare(config, abstract=True, devices=devices)
    programs = build_programs(run, target)
    batch = run.batch
    held = _held(programs, batch)
    _check_state(held, target, run)
    count = Counter(run.order)
    count = {name: count[name] for name in programs.steps}
    work = {name: _operations(programs, name, batch) for name in programs.steps}
    with ThreadPoolExecutor() as pool:  # XLA works on each with little more than one core
        compiled = pool.map(lambda name: programs.compile(name, batch, log), programs.steps)
        done = dict(zip(programs.steps, compiled, strict=True))
    shapes, update = dict(run.mesh.shape), sum(work[name] * count[name] for name in work)
    speed = utilisation * target.chip.peak / update * batch
    result = {
        "topology": topology,
        "chip": target.chip.name,
        "chips": target.count,
        "estimate": target.estimate,
        "teacher": run.teacher,
        "objective": list(config.objective),
        "mesh": shapes,
        "batch": batch,
        "microbatches": run.step_spec.microbatches,
        "memory": _memory(held, done, target.chip.memory),
        "updates": count,
        "flops": {"step": work, "update": update, "image": update / batch},
        "utilisation": utilisation,
        "images_per_second_per_chip": speed,
        "images_per_second": speed * target.count,
        "traffic": _traffic(done, count, target.count),
        "replicated": _replicated(programs),
        "seconds": {name: step.seconds for name, step in done.items()},
    }
    if largest:
        result["largest"] = _largest(programs, batch, done, log)
    return result


def _operations(programs: Programs, name: str, batch: int) -> float:
    """FLOPs of an update of the whole batch. Traced without a mesh: a kernel placed on one shows a
    chip's part, and arrays in the host's memory cannot be computed with there."""
    run, step = programs.run, UPDATES[name]

    def update(state, frozen, raw):
        made = make_batch(run.pipeline, frozen, raw, make_key(0), 0)
        return step(run.step_spec, state, run.networks(frozen), made)

    arguments = *programs.held, programs.raw(batch)
    return flops(update, *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments))


def _held(programs: Programs, batch: int) -> dict[str, int]:
    """Bytes that a chip holds between updates, by content, from shapes alone."""
    state, frozen = programs.held
    pipeline = programs.run.pipeline
    texts = list(pipeline.folder.text_encoders)
    other = {k: v for k, v in frozen.items() if k not in (pipeline.backbone, "vae", *texts)}
    parts = {f"{role} parameters": tree for role, tree in state.params.items()} | {
        "optimizer moments": state.opt,
        "EMA": state.ema,
        "teacher": frozen.get(pipeline.backbone),
        "text encoders": [frozen.get(name) for name in texts],
        "vae": frozen.get("vae"),
        "other frozen": other,
        "counters": [state.step, state.bad],
    }
    held = {name: sum(map(bytes_per_chip, jax.tree.leaves(tree))) for name, tree in parts.items()}
    held["batches"] = BATCHES_ON_CHIP * sum(map(bytes_per_chip, programs.raw(batch).values()))
    return held


def _check_state(held: dict[str, int], target: Topology, run: Run) -> None:
    total = sum(held.values())
    if total <= target.chip.memory:
        return
    largest = ", ".join(
        f"{name} {held[name] / GIB:.1f}" for name in sorted(held, key=held.get)[:-4:-1]
    )
    raise InputError(
        f"{target.name}: found {total / GIB:.1f} GiB that every chip has to hold ({largest}); "
        f"expected less than the {target.chip.memory / GIB:.1f} GiB of a {target.chip.name} "
        f"(raise mesh.fsdp, now {run.mesh.shape['fsdp']}, or offload, or take more or larger chips)"
    )


def _memory(held: dict[str, int], done: dict[str, Compiled], capacity: float) -> dict[str, Any]:
    """Memory of a chip: what it holds between updates, and what each program needs beyond that.

    Args:
      held: bytes by content, of `_held`.
      done: the compiled updates by name.
      capacity: of the chip, in bytes.
    """
    peak = max(step.peak or math.inf for step in done.values())
    return {
        "capacity": capacity,
        "held": held,
        "padding": _padding(held, done),
        "temporary": {name: step.temporary for name, step in done.items()},
        "step_peak": {name: step.peak for name, step in done.items()},
        "peak": peak if math.isfinite(peak) else None,
        "spare": capacity - peak if math.isfinite(peak) else None,
        "fits": all(step.fits for step in done.values()),
        "said": [step.text for step in done.values() if step.temporary is None],
    }


def _padding(held: dict[str, int], done: dict[str, Compiled]) -> float | None:
    """Padding bytes of a program's arguments: their size beyond that of their numbers."""
    sizes = [step.arguments for step in done.values() if step.arguments is not None]
    return (
        max(sizes) - sum(held.values()) + held["batches"] * (1 - 1 / BATCHES_ON_CHIP)
        if sizes
        else None
    )


def _traffic(done: dict[str, Compiled], count: dict[str, int], chips: int) -> dict[str, Any] | None:
    """Bytes that a chip sends for one student update, by kind of collective."""
    if any(step.temporary is None for step in done.values()):
        return None
    sent = {name: traffic(step.text, chips) for name, step in done.items()}
    return {
        "step": {name: one.sent for name, one in sent.items()},
        "update": sum(sum(one.sent.values()) * count[name] for name, one in sent.items()),
        "unknown_loops": sum(one.unknown for one in sent.values()),
    }


def _parameters(programs: Programs) -> Iterator[tuple[str, Any]]:
    """Parameters of all networks, with their paths."""
    state, frozen = programs.held
    networks = {k: v for k, v in frozen.items() if k != "null"}
    yield from jax.tree_util.tree_leaves_with_path(state.params | networks)


def _replicated(programs: Programs) -> dict[str, Any] | None:
    """Largest parameter that is replicated on every chip."""
    if programs.run.mesh.size == 1:
        return None
    replicated = [
        (x.size, path) for path, x in _parameters(programs) if x.sharding.is_fully_replicated
    ]
    size, path = max(replicated, key=lambda pair: pair[0], default=(0, ()))
    return {"name": path_name(path), "elements": size} if size else None


def _largest(programs: Programs, batch: int, done: dict[str, Compiled], log: Log) -> dict[str, Any]:
    """Largest batch with which the update of the larger peak fits: a line through two peaks, then
    a check.

    Args:
      programs: the run's updates.
      batch: the config's batch.
      done: the updates compiled for that batch, by name.
      log: called with a line of text at each compilation.
    """
    run = programs.run
    unit = math.prod(run.mesh.shape[axis] for axis in BATCH_AXES) * run.step_spec.microbatches
    name = max(done, key=lambda name: done[name].peak or math.inf)
    first = batch // unit
    compiled = {first: done[name]}
    if compiled[first].fits or first > 1:
        second = 2 * first if compiled[first].fits else 1
        compiled[second] = programs.compile(name, second * unit, log)
    for _ in range(MAX_TRIES):
        low = max((n for n, one in compiled.items() if one.fits), default=0)
        beyond = min((n for n, one in compiled.items() if not one.fits), default=math.inf)
        candidate = _predicted(compiled, programs.target.chip.memory)
        if not low or candidate <= low or low + 1 == beyond:
            break
        candidate = min(candidate, beyond - 1)
        compiled[candidate] = programs.compile(name, candidate * unit, log)
        if compiled[candidate].fits:
            break
    best = max((n for n, one in compiled.items() if one.fits), default=0)
    return {
        "batch": best * unit,
        "step": name,
        "peak": compiled[best].peak if best else None,
        "tried": {str(n * unit): one.peak for n, one in sorted(compiled.items())},
    }


def _predicted(compiled: dict[int, Compiled], memory: float) -> int:
    """Batch, in units, at which a line through the two peaks nearest to the memory meets it.

    Half-way to what does not fit where the compiler reported no sizes.
    """
    points = sorted(
        (abs(one.peak - memory), n, one.peak) for n, one in compiled.items() if one.peak
    )
    if len(points) < 2:
        return sum(compiled) // 2
    (_, a, at_a), (_, b, at_b) = points[:2]
    slope = (at_b - at_a) / (b - a)
    return math.floor(a + (memory - at_a) / slope) if slope > 0 else 2 * max(a, b)
