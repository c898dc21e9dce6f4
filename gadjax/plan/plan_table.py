"""A plan as a table for people."""

from collections.abc import Iterator
from typing import Any

from gadjax.parallel.hardware import GIB
from gadjax.plan.traffic import KINDS


def table(found: dict[str, Any]) -> str:
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    shares = found["mesh"]["data"] * found["mesh"]["fsdp"]
    yield f"{found['teacher']}: {' + '.join(found['objective'])}"
    yield f"{found['topology']}: {found['chips']} chips; mesh {mesh}"
    split = f", in {found['microbatches']} microbatches" if found["microbatches"] > 1 else ""
    yield f"batch {found['batch']}, {found['batch'] // shares} a share{split}"
    if found["estimate"]:
        yield "ESTIMATE: compiled for CPUs; a GPU's own program needs other temporaries"
    yield from _memory(found["memory"])
    yield ""
    work, names = found["flops"], list(found["updates"])
    for name, times in found["updates"].items():
        yield _row(f"TFLOP, {name} step x {times}", work["step"][name] / 1e12)
    yield _row("TFLOP, a student update", work["update"] / 1e12)
    yield _row("TFLOP, an image of it", work["image"] / 1e12)
    each, whole = found["images_per_second_per_chip"], found["images_per_second"]
    yield _row(f"images/s of a chip at {found['utilisation']:.0%} of its peak", each)
    yield _row("images/s of all chips", whole)
    if sent := found["traffic"]:
        yield ""
        kinds = [kind for kind in KINDS if any(kind in sent["step"][name] for name in names)]
        for name in names:
            for kind in kinds:
                yield _row(f"GiB sent, {name} step: {kind}", sent["step"][name].get(kind, 0) / GIB)
        yield _row("GiB sent, a student update", sent["update"] / GIB)
        if lost := sent["unknown_loops"]:
            yield f"{lost} loops of unknown length are counted once"
    if whole := found["replicated"]:
        yield ""
        yield f"largest parameter on every chip: {whole['name']}, {whole['elements']:,} elements"
    if best := found.get("largest"):
        yield ""
        yield _best(best)


def _memory(memory: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield "GiB of a chip"
    for name, size in memory["held"].items():
        if size:
            yield _row(name, size / GIB)
    if memory["padding"] is not None:
        yield _row("padding of their layouts", memory["padding"] / GIB)
    for name, size in memory["temporary"].items():
        yield _row(f"temporaries, {name} step", None if size is None else size / GIB)
    for name, size in memory["step_peak"].items():
        yield _row(f"peak, {name} step", None if size is None else size / GIB)
    yield _row("peak", None if memory["peak"] is None else memory["peak"] / GIB)
    yield _row("a chip has", memory["capacity"] / GIB)
    if memory["fits"]:
        yield f"fits, with {memory['spare'] / GIB:.2f} GiB to spare"
    elif memory["spare"] is None:
        yield "does not fit"
    else:
        yield f"does not fit: {-memory['spare'] / GIB:.2f} GiB too much"
    yield from memory["said"]


def _best(best: dict[str, Any]) -> str:
    if not best["batch"]:
        return "largest batch: none fits"
    peak = best["peak"] / GIB
    return f"largest batch that fits: {best['batch']}, {best['step']} step at {peak:.2f} GiB"


def _row(name: str, value: float | None) -> str:
    return f"  {name:<52}{'unknown' if value is None else f'{value:10.3f}':>10}"
