"""Plan of a run as a table in plain text."""

from collections.abc import Iterator
from typing import Any

from gadjax.parallel.hardware import GIB
from gadjax.plan.traffic import KINDS


def table(plan: dict[str, Any]) -> str:
    """Table of what `gadjax.plan.plan.plan` returns."""
    return "\n".join(_lines(plan))


def _lines(plan: dict[str, Any]) -> Iterator[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    shares = plan["mesh"]["data"] * plan["mesh"]["fsdp"]
    yield f"{plan['teacher']}: {' + '.join(plan['objective'])}"
    yield f"{plan['topology']}: {plan['chips']} chips; mesh {mesh}"
    split = f", in {plan['microbatches']} microbatches" if plan["microbatches"] > 1 else ""
    yield f"batch {plan['batch']}, {plan['batch'] // shares} a share{split}"
    if plan["estimate"]:
        yield "ESTIMATE: compiled for CPUs; a GPU's own program needs other temporaries"
    yield from _memory(plan["memory"])
    yield ""
    work, names = plan["flops"], list(plan["updates"])
    for name, times in plan["updates"].items():
        yield _row(f"TFLOP, {name} step x {times}", work["step"][name] / 1e12)
    yield _row("TFLOP, a student update", work["update"] / 1e12)
    yield _row("TFLOP, an image of it", work["image"] / 1e12)
    per_chip, total = plan["images_per_second_per_chip"], plan["images_per_second"]
    yield _row(f"images/s of a chip at {plan['utilisation']:.0%} of its peak", per_chip)
    yield _row("images/s of all chips", total)
    if sent := plan["traffic"]:
        yield ""
        kinds = [kind for kind in KINDS if any(kind in sent["step"][name] for name in names)]
        for name in names:
            for kind in kinds:
                yield _row(f"GiB sent, {name} step: {kind}", sent["step"][name].get(kind, 0) / GIB)
        yield _row("GiB sent, a student update", sent["update"] / GIB)
        if unknown := sent["unknown_loops"]:
            yield f"{unknown} loops of unknown length are counted once"
    if leaf := plan["replicated"]:
        yield ""
        yield f"largest parameter on every chip: {leaf['name']}, {leaf['elements']:,} elements"
    if best := plan.get("largest"):
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
